"""Self-attention with the kernel that splits and rotates, by Triton's interpreter, against the same without it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from mbridge_model import Parallel

from testing.gang import Gang
from testing.megatron_forward import pack, run_forward
from testing.tiny_models import VOCAB_SIZE, make_model

LENGTHS = (1, 17, 6, 9)
LAYOUTS = {"TP 1": Parallel(), "TP 2 SP": Parallel(tensor=2, sequence=True), "PP 2": Parallel(pipeline=2)}


def with_and_without(directory: Path, parallel: Parallel, overrides: dict[str, Any]) -> tuple[float, int]:
    """Runs in a worker: the largest difference of logits, dense and packed, and how often the kernel ran."""
    from mbridge_model import load, rotary_kernels
    from mbridge_model.self_attention import RotarySelfAttention
    from megatron.core import parallel_state

    model, _ = load(directory, parallel, overrides)
    generator = torch.Generator().manual_seed(1)
    dense = torch.randint(VOCAB_SIZE, (3, 18), generator=generator)
    sequences = [torch.randint(VOCAB_SIZE, (length,), generator=generator) for length in LENGTHS]
    row, packing, _ = pack(sequences, parallel.tensor if parallel.sequence else 1)

    launched = 0

    def launch(*args: Any, **flags: bool) -> None:
        nonlocal launched
        launched += 1
        rotary_kernels_launch(*args, **flags)

    def serves_here(attention: Any, hidden: torch.Tensor, angles: Any) -> bool:
        return bool(attention._has_kernel)  # for the test a CPU will do

    def logits() -> list[torch.Tensor]:
        found = [run_forward(model, dense, VOCAB_SIZE), run_forward(model, row, VOCAB_SIZE, packing)]
        return [one for one in found if one is not None]

    rotary_kernels_launch, serves = rotary_kernels._launch, RotarySelfAttention._kernel_serves
    try:
        for chunk in model:
            chunk.eval()
        expected = logits()
        RotarySelfAttention._kernel_serves = serves_here  # type: ignore[method-assign]
        rotary_kernels._launch = launch
        differences = [float((a - b).abs().max()) for a, b in zip(logits(), expected, strict=True)]
        return max(differences, default=0.0), launched
    finally:
        RotarySelfAttention._kernel_serves = serves  # type: ignore[method-assign]
        rotary_kernels._launch = rotary_kernels_launch
        parallel_state.destroy_model_parallel()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_kernel_in_the_model(gang2: Gang, tmp_path: Path, layout: str) -> None:
    make_model("qwen2", False, tmp_path)
    layers = 2 if "PP" in layout else 4
    for difference, launched in gang2.run(with_and_without, tmp_path, LAYOUTS[layout], {}):
        assert difference <= 1e-5
        assert launched == 2 * layers, "once a layer"


@pytest.mark.parametrize(
    ("family", "parallel", "overrides"),
    [
        ("qwen3", Parallel(), {}),  # norms of queries and keys
        ("qwen2", Parallel(), {"no_rope_freq": [0, 1, 0, 1]}),
    ],
)
def test_where_it_does_not_serve(
    gang2: Gang, tmp_path: Path, family: str, parallel: Parallel, overrides: dict[str, Any]
) -> None:
    make_model(family, False, tmp_path)
    assert gang2.run(with_and_without, tmp_path, parallel, overrides) == [(0.0, 0)] * 2


def test_fewer_groups_than_ranks(gang2: Gang, tmp_path: Path) -> None:
    make_model("qwen2", False, tmp_path, num_key_value_heads=1)
    assert gang2.run(with_and_without, tmp_path, Parallel(tensor=2), {}) == [(0.0, 0)] * 2
