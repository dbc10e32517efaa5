"""Vision-language models against transformers in fp32: logits, positions, gradients, and the bit-exact way back."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from mbridge_model import Parallel
from safetensors.torch import load_file, save_file

from testing.gang import Gang
from testing.tiny_models import VOCAB_SIZE, make_vision_model
from testing.vision_samples import gradients_of, write_reference

TOLERANCE = 1e-5  # max abs difference of logits
GRADIENT_TOLERANCE = 1e-5  # of the largest entry of each gradient

LAYOUTS_2 = {
    "TP 1": Parallel(),
    "TP 2": Parallel(tensor=2),
    "PP 2": Parallel(pipeline=2),
    "TP 2 SP": Parallel(tensor=2, sequence=True),
}
LAYOUTS_4 = {
    "TP 2 x PP 2": Parallel(tensor=2, pipeline=2),
    "TP 2 SP x PP 2": Parallel(tensor=2, pipeline=2, sequence=True),
    "PP 4": Parallel(pipeline=4),
}
# Experts are split over tensor parallelism with sequence parallelism only.
CASES_2 = [(family, layout) for family in ("qwen2_5_vl", "qwen3_vl") for layout in LAYOUTS_2] + [
    ("qwen3_vl_moe", layout) for layout in ("TP 1", "TP 2", "PP 2")
]
CASES_4 = [
    (family, layout) for family in ("qwen2_5_vl", "qwen3_vl") for layout in ("TP 2 x PP 2", "TP 2 SP x PP 2")
] + [
    ("qwen3_vl", "PP 4"),
    ("qwen3_vl_moe", "TP 2 SP x PP 2"),
]
# Of Qwen3-VL's three deepstack features the later stages need two.
EARLY_CUT = {"num_layers_in_first_pipeline_stage": 1}


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Makes a model directory once, with what transformers says of the model beside it."""
    root = tmp_path_factory.mktemp("vision")

    @cache
    def make(family: str) -> Path:
        directory = root / family
        # Embeddings of both kinds: tied in one family, untied in the others.
        model = make_vision_model(family, family == "qwen2_5_vl", directory)
        write_reference(model, directory, frames_are_runs=family != "qwen2_5_vl")
        if family == "qwen3_vl_moe":
            for written in (directory, gradients_of(directory)):
                transpose_experts(written / "model.safetensors")
        return directory

    return make


def transpose_experts(file: Path) -> None:
    """As they lie in the published checkpoints: inputs before outputs, which transformers turns when it loads them."""
    tensors = load_file(file)
    save_file(
        {
            name: tensor.transpose(1, 2).contiguous() if ".experts." in name else tensor
            for name, tensor in tensors.items()
        },
        file,
        metadata={"format": "pt"},
    )


def compare(directory: Path, parallel: Parallel, overrides: dict[str, Any] | None = None) -> dict[str, Any]:
    """On each rank: the largest differences, the exported tensors that are not bit-exact, layers of this stage."""
    from mbridge_model import MropeSettings, export, load
    from megatron.core import parallel_state

    from testing.vision_forward import dense_batch, gradients_into_weights, packed_batch, positions_of, run

    samples = torch.load(directory.with_suffix(".pt"), weights_only=True)
    settings = MropeSettings.from_directory(directory)
    model, handle = load(directory, parallel, overrides)
    try:
        result: dict[str, Any] = {"layers": len(model[0].language_model.decoder.layers)}
        result["positions"] = [
            name
            for name, sample in samples.items()
            if not torch.equal(positions_of(sample, settings), sample["position_ids"])
        ]
        for chunk in model:
            chunk.eval()
        multiple = parallel.tensor if handle.config.sequence_parallel else 1
        everything, text = list(samples.values()), [samples["text"], samples["one token"]]
        lengths = [len(sample["tokens"]) for sample in everything]
        for kind, chosen, make in (
            ("dense", everything, dense_batch),
            ("packed", everything, packed_batch),
            ("one image", [samples["one image"]], dense_batch),
            ("text only", text, packed_batch),
        ):
            batch, starts = make(chosen, settings, multiple)
            logits = run(model, batch, starts, [len(sample["tokens"]) for sample in chosen], VOCAB_SIZE, backward=False)
            if logits is not None:
                pairs = zip(logits, [sample["logits"] for sample in chosen], strict=True)
                result[kind] = max((ours - theirs).abs().max().item() for ours, theirs in pairs)
        source = load_file(directory / "model.safetensors")
        exported = {name: tensor.clone() for name, tensor in export(model, handle)}
        result["wrong"] = sorted(set(source) ^ set(exported)) + [
            name for name, tensor in exported.items() if not torch.equal(tensor, source[name])
        ]
        batch, starts = packed_batch(everything, settings, multiple)
        gradients_into_weights(model, batch, starts, lengths, VOCAB_SIZE)
        result["unequal copies"] = unequal_copies(model[0])
        expected = load_file(gradients_of(directory) / "model.safetensors")
        result["gradients"] = {
            name: ((gradient - expected[name]).abs().max() / expected[name].abs().max()).item()
            for name, gradient in export(model, handle)
        }
        return result
    finally:
        parallel_state.destroy_model_parallel()


def unequal_copies(chunk: torch.nn.Module) -> list[str]:
    """Parameters of the tower that each tensor-parallel rank holds whole, and that have not the same gradient there."""
    from megatron.core import parallel_state

    group = parallel_state.get_tensor_model_parallel_group()
    unequal = []
    for name, parameter in chunk.named_parameters():
        if name.startswith("vis") and not getattr(parameter, "tensor_model_parallel", False):
            copies = [torch.empty_like(parameter) for _ in range(group.size())]
            torch.distributed.all_gather(copies, parameter.detach(), group=group)
            if not torch.allclose(copies[0], copies[-1], rtol=1e-5, atol=1e-6):
                unequal.append(name)
    return unequal


def check(results: list[dict[str, Any]]) -> None:
    kinds = ("dense", "packed", "one image", "text only")
    assert any("dense" in result for result in results)
    for result in results:
        assert result["wrong"] == []
        assert result["positions"] == []
        assert result["unequal copies"] == []
        for kind in kinds:
            assert result.get(kind, 0.0) <= TOLERANCE, (kind, result[kind])
        worst = max(result["gradients"], key=result["gradients"].__getitem__)
        assert result["gradients"][worst] <= GRADIENT_TOLERANCE, (worst, result["gradients"][worst])
    print({kind: max(result.get(kind, 0.0) for result in results) for kind in kinds})
    print("gradients", max(max(result["gradients"].values()) for result in results))


@pytest.mark.parametrize(("family", "layout"), CASES_2)
def test_two_ranks(gang2: Gang, reference: Callable[[str], Path], family: str, layout: str) -> None:
    results = gang2.run(compare, reference(family), LAYOUTS_2[layout])
    check(results)
    if layout == "PP 2":
        assert [result["layers"] for result in results] == ([2, 2] if family == "qwen2_5_vl" else [3, 1])


@pytest.mark.parametrize(("family", "layout"), CASES_4)
def test_four_ranks(gang4: Gang, reference: Callable[[str], Path], family: str, layout: str) -> None:
    results = gang4.run(compare, reference(family), LAYOUTS_4[layout])
    check(results)
    if layout == "PP 4":
        assert [result["layers"] for result in results] == [1, 1, 1, 1]


def test_a_cut_that_the_user_chose(gang2: Gang, reference: Callable[[str], Path]) -> None:
    results = gang2.run(compare, reference("qwen3_vl"), Parallel(pipeline=2), EARLY_CUT)
    check(results)
    assert [result["layers"] for result in results] == [1, 3]


def half_precision(directory: Path, parallel: Parallel) -> float | None:
    from mbridge_model import MropeSettings, load
    from megatron.core import parallel_state

    from testing.vision_forward import packed_batch, run

    samples = list(torch.load(directory.with_suffix(".pt"), weights_only=True).values())
    batch, starts = packed_batch(samples, MropeSettings.from_directory(directory), parallel.tensor)
    model, _ = load(directory, parallel, dtype=torch.bfloat16)
    try:
        logits = run(model, batch, starts, [len(sample["tokens"]) for sample in samples], VOCAB_SIZE, backward=False)
    finally:
        parallel_state.destroy_model_parallel()
    if logits is None:
        return None
    assert logits[0].dtype == torch.bfloat16
    return max(
        (ours.float() - sample["logits"]).abs().max().item() for ours, sample in zip(logits, samples, strict=True)
    )


@pytest.mark.parametrize("layout", ["TP 2 SP", "PP 2"])
@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_bfloat16_is_near_fp32(gang2: Gang, reference: Callable[[str], Path], family: str, layout: str) -> None:
    differences = gang2.run(half_precision, reference(family), LAYOUTS_2[layout])
    # 8 bits of mantissa, logits up to 4: an error of each layer's rounding, and not of fp32's.
    assert all(1e-3 < difference < 0.15 for difference in differences if difference is not None)
    assert differences[-1] is not None
