"""SwiGLU's kernels against torch in double precision; where there is no GPU, by Triton's interpreter."""

from collections.abc import Iterator

import pytest
import torch
from mbridge_model import enable_cpu
from mbridge_model.patches import PatchTable

enable_cpu()

from megatron.core.fusions import fused_bias_swiglu  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def swiglu() -> Iterator[PatchTable]:
    """The table, applied for as long as the test runs."""
    from mbridge_model.patches.swiglu import SWIGLU

    with SWIGLU:
        yield SWIGLU


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")
@pytest.mark.parametrize("shape", [(3, 5), (2, 3, 1030), (1, 1024), (0, 4)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 8e-3)])
def test_output_and_gradient(swiglu: PatchTable, shape: tuple[int, ...], dtype: torch.dtype, tolerance: float) -> None:
    generator = torch.Generator().manual_seed(sum(shape))
    inputs = torch.randn(*shape[:-1], 2 * shape[-1], generator=generator).to(DEVICE, dtype)
    inputs[..., :1] = -200  # whose exponential overflows
    inputs.requires_grad_()
    outer = torch.randn(shape, generator=generator).to(DEVICE, dtype)
    exact = inputs.detach().double().requires_grad_()
    gate, value = exact.chunk(2, -1)
    expected = torch.nn.functional.silu(gate) * value
    (expected_gradient,) = torch.autograd.grad(expected, exact, outer.double())

    output = fused_bias_swiglu.bias_swiglu_impl(inputs, None)
    (gradient,) = torch.autograd.grad(output, inputs, outer.mT.contiguous().mT)
    for ours, theirs in ((output, expected), (gradient, expected_gradient)):
        assert ours.dtype == dtype and ours.shape == theirs.shape
        torch.testing.assert_close(ours.double(), theirs, rtol=tolerance, atol=tolerance)


def test_other_storage_is_left_to_megatron(swiglu: PatchTable) -> None:
    installed = fused_bias_swiglu.SwiGLUFunction
    swiglu.apply()
    assert fused_bias_swiglu.SwiGLUFunction is installed, "once"
    inputs = torch.randn(3, 8, device=DEVICE, requires_grad=True)
    functions = [fused_bias_swiglu.bias_swiglu_impl(inputs, None, in_fp8).grad_fn for in_fp8 in (False, True)]
    assert [type(function).__name__ for function in functions] == ["SwiGLUBackward", "SwiGLUFunctionBackward"]
