"""Logits against transformers in fp32, and the bit-exact way back, for each family under each layout."""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from mbridge_model import Parallel

from testing.gang import Gang
from testing.megatron_forward import pack, run_forward
from testing.tiny_models import VOCAB_SIZE, make_model

TOLERANCE = 1e-5  # max abs difference of logits

# Lengths of packed sequences: one token, odd numbers, a repeated length.
PACKED_LENGTHS = (1, 17, 6, 9, 17, 2)

LAYOUTS_2 = {
    "TP 1": Parallel(),
    "TP 2": Parallel(tensor=2),
    "PP 2": Parallel(pipeline=2),
    "TP 2 SP": Parallel(tensor=2, sequence=True),
}
LAYOUTS_4 = {
    "TP 2 x PP 2": Parallel(tensor=2, pipeline=2),
    "TP 2 SP x PP 2": Parallel(tensor=2, pipeline=2, sequence=True),
}
MODELS = [(family, tied) for family in ("llama", "qwen2", "qwen3") for tied in (False, True)]


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, bool], Path]:
    """Makes a model directory once, with what transformers says of the model in a .pt file beside it."""
    root = tmp_path_factory.mktemp("parity")

    @cache
    def make(family: str, tied: bool) -> Path:
        directory = root / f"{family}-{tied}"
        model = make_model(family, tied, directory)
        generator = torch.Generator().manual_seed(1)
        dense = torch.randint(VOCAB_SIZE, (3, 18), generator=generator)
        packed = [torch.randint(VOCAB_SIZE, (length,), generator=generator) for length in PACKED_LENGTHS]
        with torch.no_grad():
            content = {
                "dense": (dense, model(dense).logits),
                "packed": (packed, [model(tokens[None]).logits[0] for tokens in packed]),
                "weights": {name: tensor.clone() for name, tensor in model.state_dict().items()},
            }
        torch.save(content, directory.with_suffix(".pt"))
        return directory

    return make


def compare(directory: Path, parallel: Parallel) -> dict[str, float | list[str]]:
    """On each rank: the largest differences on the last stage, and the exported tensors that are not bit-exact."""
    from mbridge_model import export, load
    from megatron.core import parallel_state

    reference = torch.load(directory.with_suffix(".pt"), weights_only=True)
    model, handle = load(directory, parallel)
    try:
        for chunk in model:
            chunk.eval()
        result: dict[str, float | list[str]] = {}
        tokens, expected = reference["dense"]
        logits = run_forward(model, tokens, VOCAB_SIZE)
        if logits is not None:
            result["dense"] = (logits - expected).abs().max().item()
        sequences, expected_list = reference["packed"]
        multiple = parallel.tensor if parallel.sequence else 1
        row, packing, starts = pack(sequences, multiple)
        logits = run_forward(model, row, VOCAB_SIZE, packing)
        if logits is not None:
            result["packed"] = max(
                (logits[0, start : start + len(sequence)] - want).abs().max().item()
                for start, sequence, want in zip(starts, sequences, expected_list, strict=True)
            )
        weights = reference["weights"]
        exported = {key: tensor.clone() for key, tensor in export(model, handle)}
        absent = (
            set(weights)
            - set(exported)
            - ({"lm_head.weight"} if handle.config.share_embeddings_and_output_weights else set())
        )
        result["wrong"] = sorted(absent) + [
            key for key, value in exported.items() if not torch.equal(value, weights[key])
        ]
        return result
    finally:
        parallel_state.destroy_model_parallel()


def check(results: list[dict[str, float | list[str]]]) -> None:
    assert any("dense" in result for result in results)
    for result in results:
        assert result["wrong"] == []
        for kind in ("dense", "packed"):
            assert result.get(kind, 0.0) <= TOLERANCE, (kind, result)


@pytest.mark.parametrize("layout", LAYOUTS_2)
@pytest.mark.parametrize(("family", "tied"), MODELS)
def test_two_ranks(gang2: Gang, reference: Callable[[str, bool], Path], family: str, tied: bool, layout: str) -> None:
    check(gang2.run(compare, reference(family, tied), LAYOUTS_2[layout]))


@pytest.mark.parametrize("layout", LAYOUTS_4)
@pytest.mark.parametrize(("family", "tied"), MODELS)
def test_four_ranks(gang4: Gang, reference: Callable[[str, bool], Path], family: str, tied: bool, layout: str) -> None:
    check(gang4.run(compare, reference(family, tied), LAYOUTS_4[layout]))


@pytest.mark.parametrize("layout", ["TP 1", "TP 2", "PP 2"])
def test_geometry_of_deepseek_r1_distill_qwen(gang2: Gang, reference: Callable[[str, bool], Path], layout: str) -> None:
    """Untied, 12 query heads on 2 groups: its log probabilities came out wrong in Megatron-Bridge issue 506."""
    check(gang2.run(compare, reference("r1-distill-qwen-1.5b", False), LAYOUTS_2[layout]))
