"""Self-attention with the kernels that split and rotate, by Triton's interpreter, against the same without them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from mbridge_model import Parallel

from testing.gang import Gang
from testing.megatron_forward import pack
from testing.tiny_models import VOCAB_SIZE, make_model

LENGTHS = (1, 17, 6, 9)
LAYERS = 4
SEQUENCE_PARALLEL = Parallel(tensor=2, sequence=True)
RECOMPUTED = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}


def with_and_without(directory: Path, parallel: Parallel, overrides: dict[str, Any]) -> tuple[float, int]:
    """Runs in a worker: the largest difference of logits and gradients, dense and packed, and how many kernels ran."""
    from mbridge_model import load
    from mbridge_model.kernels import rotary as rotary_kernels
    from mbridge_model.kernels import self_attention
    from megatron.core import parallel_state
    from torch import Tensor

    (model,), _ = load(directory, parallel, overrides)
    generator = torch.Generator().manual_seed(1)
    dense = torch.randint(VOCAB_SIZE, (3, 18), generator=generator)
    sequences = [torch.randint(VOCAB_SIZE, (length,), generator=generator) for length in LENGTHS]
    row, packing, _ = pack(sequences, parallel.tensor if parallel.sequence else 1)

    def results() -> list[Tensor]:
        found = []
        for tokens, packed in ((dense, None), (row, packing)):
            positions = torch.arange(tokens.shape[1]).expand_as(tokens)
            logits = model(tokens, positions, None, packed_seq_params=packed)
            outer = torch.sin(torch.arange(logits.numel()).view(logits.shape))
            model.zero_grad()
            (logits * outer).sum().backward()
            found += [logits.detach(), *(parameter.grad for parameter in model.parameters())]
        return found

    launched = 0

    def launch(*args: Any, **flags: bool) -> None:
        nonlocal launched
        launched += 1
        own_launch(*args, **flags)

    own_launch, own_runs_kernels = rotary_kernels._launch, self_attention.runs_kernels
    try:
        expected = results()
        self_attention.runs_kernels = lambda tensor: True  # for the test a CPU will do
        rotary_kernels._launch = launch
        found = results()
        return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(found, expected, strict=True)), launched
    finally:
        self_attention.runs_kernels, rotary_kernels._launch = own_runs_kernels, own_launch
        parallel_state.destroy_model_parallel()


@pytest.mark.parametrize(
    ("family", "parallel", "recomputation"),  # qwen2 has a bias
    [("qwen2", Parallel(), {}), ("llama", SEQUENCE_PARALLEL, {}), ("qwen2", SEQUENCE_PARALLEL, RECOMPUTED)],
)
def test_kernels_in_the_model(
    gang2: Gang, tmp_path: Path, family: str, parallel: Parallel, recomputation: dict[str, Any]
) -> None:
    make_model(family, False, tmp_path)
    for difference, launched in gang2.run(with_and_without, tmp_path, parallel, recomputation):
        assert difference <= 2e-5
        assert launched == 2 * LAYERS * (3 if recomputation else 2), "once a layer and pass"


@pytest.mark.parametrize(
    ("family", "sizes", "parallel", "overrides"),
    [
        ("qwen3", {}, Parallel(), {}),  # norms of queries and keys
        ("qwen2", {}, Parallel(), {"no_rope_freq": [0, 1, 0, 1]}),
        ("qwen2", {"num_key_value_heads": 1}, Parallel(tensor=2), {}),  # fewer groups than ranks
        ("llama", {"partial_rotary_factor": 0.5}, Parallel(), {"rotary_percent": 0.5}),
    ],
)
def test_where_they_do_not_serve(
    gang2: Gang, tmp_path: Path, family: str, sizes: dict[str, Any], parallel: Parallel, overrides: dict[str, Any]
) -> None:
    make_model(family, False, tmp_path, **sizes)
    assert [launched for _, launched in gang2.run(with_and_without, tmp_path, parallel, overrides)] == [0, 0]
