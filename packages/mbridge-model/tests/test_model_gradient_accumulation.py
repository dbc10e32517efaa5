"""Weight gradients that are added to an fp32 buffer, against the product in double precision."""

import inspect
import re

import pytest
import torch
from mbridge_model import enable_cpu

enable_cpu()

from mbridge_model.gradient_accumulation import accumulate_weight_gradient, embedding  # noqa: E402
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
    if is_tied:
        weight.zero_out_wgrad = True  # type: ignore[attr-defined]
    with torch.no_grad():
        assert torch.equal(embedding(tokens, weight), values[tokens])
    assert getattr(weight, "zero_out_wgrad", True), "until it accumulates"
    output = embedding(tokens, weight)
    assert torch.equal(output, values[tokens])
    output.backward(outer)
    if is_tied:
        assert weight.grad is None
        torch.testing.assert_close(weight.main_grad, 1 + expected)
        assert not weight.zero_out_wgrad
    else:
        torch.testing.assert_close(weight.grad, expected)
        assert torch.equal(weight.main_grad, torch.ones(5, 3))
