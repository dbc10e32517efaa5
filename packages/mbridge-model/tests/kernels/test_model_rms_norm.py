"""RMSNorm's gradients against torch's in double precision; where there is no GPU, by Triton's interpreter."""

import pytest
import torch
from mbridge_model import enable_cpu

enable_cpu()

from mbridge_model.kernels.rms_norm import RMSNorm  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("shape", [(3, 5), (2, 3, 1030), (7, 2, 2, 16), (300, 128), (0, 4), (1, 2500)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.bfloat16, 2e-2)])
def test_output_and_gradients(shape: tuple[int, ...], dtype: torch.dtype, tolerance: float) -> None:
    generator = torch.Generator().manual_seed(sum(shape))
    hidden = torch.randn(shape, generator=generator).to(DEVICE, dtype).requires_grad_()
    weight = (1 + torch.rand(shape[-1], generator=generator)).to(DEVICE, dtype).requires_grad_()
    outer = torch.randn(shape, generator=generator).to(DEVICE, dtype)
    exact = [tensor.detach().double().requires_grad_() for tensor in (hidden, weight)]
    expected = torch.nn.functional.rms_norm(exact[0], exact[1].shape, exact[1], 1e-5)
    output = RMSNorm.apply(hidden, weight, 1e-5)
    found = [output, *torch.autograd.grad(output, (hidden, weight), outer.mT.contiguous().mT)]
    for ours, theirs in zip(found, [expected, *torch.autograd.grad(expected, exact, outer.double())], strict=True):
        assert ours.dtype == dtype and ours.shape == theirs.shape
        torch.testing.assert_close(ours.double(), theirs, rtol=tolerance, atol=tolerance)
