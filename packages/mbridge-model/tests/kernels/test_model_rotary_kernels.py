"""The kernels that split and rotate, against plain torch; where there is no GPU, by Triton's interpreter."""

import pytest
import torch
from mbridge_model import enable_cpu

enable_cpu()

from mbridge_model.kernels.rotary import SplitAndRotate  # noqa: E402
from megatron.core.models.common.embeddings import rope_utils  # noqa: E402
from torch import Tensor  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SCALE = 1.1


def step_by_step(fused: Tensor, angles: Tensor, groups: int, queries: int, rounded: torch.dtype) -> tuple[Tensor, ...]:
    """In double precision but for cosine and sine, which the models round to the activations' number format."""
    channels = angles.shape[-1]
    parts = fused.view(*fused.shape[:2], groups, queries + 2, channels).split([queries, 1, 1], dim=3)
    cosine, sine = ((function(angles) * SCALE).to(rounded).double() for function in (torch.cos, torch.sin))

    def rotate(tensor: Tensor) -> Tensor:
        return tensor * cosine + rope_utils._rotate_half(tensor, rotary_interleaved=False) * sine

    query, key, value = (part.flatten(2, 3) for part in parts)
    return rotate(query), rotate(key), value


@pytest.mark.parametrize(
    ("sequence", "batch", "groups", "queries", "channels"),
    [(5, 2, 2, 6, 8), (7, 1, 1, 1, 6), (1, 3, 3, 7, 16), (0, 1, 2, 2, 4)],
)
@pytest.mark.parametrize("has_bias", [False, True])
# In bfloat16 the interpreter cuts off where a GPU rounds.
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 5e-2)])
def test_output_and_gradient(
    sequence: int,
    batch: int,
    groups: int,
    queries: int,
    channels: int,
    has_bias: bool,
    dtype: torch.dtype,
    tolerance: float,
) -> None:
    generator = torch.Generator().manual_seed(sequence)
    fused = torch.randn(sequence, batch, groups * (queries + 2) * channels, generator=generator).to(DEVICE, dtype)
    fused.requires_grad_()
    angles = 100 * torch.rand(sequence, 1, 1, channels // 2, generator=generator).to(DEVICE).repeat(1, 1, 1, 2)
    exact = fused.detach().double().requires_grad_()
    bias = torch.randn(fused.shape[-1], generator=generator).to(DEVICE, dtype).requires_grad_() if has_bias else None
    exact_bias = None if bias is None else bias.detach().double().requires_grad_()
    summed = exact if exact_bias is None else exact + exact_bias
    expected = step_by_step(summed, angles, groups, queries, dtype)
    found = SplitAndRotate.apply(fused, bias, angles, groups, queries, SCALE)
    outer = [torch.randn(tensor.shape, generator=generator).to(DEVICE, dtype) for tensor in expected]
    expected += torch.autograd.grad(
        expected, [exact] if exact_bias is None else [exact, exact_bias], [gradient.double() for gradient in outer]
    )
    # Attention may give them with heads before the sequence in memory.
    outer = [gradient.transpose(0, 2).contiguous().transpose(0, 2) for gradient in outer]
    found += torch.autograd.grad(found, [fused] if bias is None else [fused, bias], outer)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == dtype and ours.is_contiguous()
        torch.testing.assert_close(ours.double(), theirs, rtol=tolerance, atol=tolerance)
