"""Weight gradients that are added to an fp32 buffer, against the product in double precision."""

import inspect
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from mbridge_model import Parallel, enable_cpu, load

from testing.gang import Gang
from testing.tiny_models import make_model, make_vision_model

enable_cpu()

from mbridge_model.patches.gradient_accumulation import accumulate_weight_gradient, embedding  # noqa: E402
from megatron.core import parallel_state  # noqa: E402
from megatron.core.tensor_parallel import layers  # noqa: E402


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("tokens", [0, 1, 37])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adds_to_the_buffer(dtype: torch.dtype, tokens: int, device: str) -> None:
    generator = torch.Generator().manual_seed(tokens)
    inputs, gradient = (torch.randn(tokens, size, generator=generator).to(device, dtype) for size in (5, 3))
    buffer = torch.randn(3, 5, generator=generator).to(device)
    expected = buffer.double() + gradient.double().t() @ inputs.double()
    address = buffer.data_ptr()
    accumulate_weight_gradient(inputs, gradient, buffer)
    assert buffer.data_ptr() == address and buffer.dtype == torch.float32
    # On a CPU the product of half-precision numbers is rounded once before it is added.
    tolerance = 2e-2 if dtype == torch.bfloat16 and device == "cpu" else 1e-5
    torch.testing.assert_close(buffer.double(), expected, rtol=tolerance, atol=tolerance)


def test_megatron_asks_torch_for_nothing_else() -> None:
    assert set(re.findall(r"\bF\.(\w+)", inspect.getsource(layers))) == {"embedding"}


@pytest.mark.parametrize("is_tied", [False, True])
def test_embedding(is_tied: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(5, 3, generator=generator)
    tokens = torch.tensor([[4, 0, 4], [1, 4, 4]])
    outer = torch.randn(2, 3, 3, generator=generator)
    expected = torch.zeros(5, 3).index_add_(0, tokens.flatten(), outer.flatten(0, 1))
    weight = torch.nn.Parameter(values)
    weight.main_grad = torch.ones(5, 3)  # type: ignore[attr-defined]
    weight.accumulates_rows = is_tied  # type: ignore[attr-defined]
    with torch.no_grad():
        assert not embedding(tokens, weight).requires_grad
    output = embedding(tokens, weight)
    assert torch.equal(output, values[tokens])
    output.backward(outer)
    if is_tied:
        assert weight.grad is None
        torch.testing.assert_close(weight.main_grad, 1 + expected)
    else:
        torch.testing.assert_close(weight.grad, expected)
        assert torch.equal(weight.main_grad, torch.ones(5, 3))


def which_are_marked(directory: Path, parallel: Parallel, overrides: dict[str, Any]) -> list[bool]:
    """Runs in a worker: of each embedding of this rank, whether it accumulates."""
    model, _ = load(directory, parallel, overrides)
    parallel_state.destroy_model_parallel()
    found = {name: parameter for chunk in model for name, parameter in chunk.named_parameters()}
    return [hasattr(parameter, "accumulates_rows") for name, parameter in found.items() if "word_embeddings" in name]


def test_marked_are_tied_ones_of_one_stage(gang2: Gang, tmp_path: Path) -> None:
    for family, tied in (("qwen2", True), ("qwen2", False)):
        make_model(family, tied, tmp_path / str(tied))
    make_vision_model("qwen2_5_vl", True, tmp_path / "vision")
    fused = {"gradient_accumulation_fusion": True}
    assert gang2.run(which_are_marked, tmp_path / "True", Parallel(tensor=2), fused) == [[True], [True]]
    assert gang2.run(which_are_marked, tmp_path / "vision", Parallel(), fused) == [[True], [True]]
    assert gang2.run(which_are_marked, tmp_path / "True", Parallel(tensor=2), {}) == [[False], [False]]
    assert gang2.run(which_are_marked, tmp_path / "False", Parallel(tensor=2), fused) == [[False], [False]]
    first, last = gang2.run(which_are_marked, tmp_path / "True", Parallel(pipeline=2), fused)
    assert not any(first + last)
