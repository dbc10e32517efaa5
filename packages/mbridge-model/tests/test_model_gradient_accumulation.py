"""Weight gradients that are added to an fp32 buffer, against the product in double precision."""

import pytest
import torch
from mbridge_model import enable_cpu

enable_cpu()

from mbridge_model.gradient_accumulation import accumulate_weight_gradient  # noqa: E402


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
