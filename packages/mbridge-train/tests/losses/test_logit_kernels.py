"""The pass over logits against torch in double precision; where there is no GPU, by Triton's interpreter."""

import math

import pytest
import torch
from mbridge_train.losses.logit_kernels import maximum_and_sums

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize(("tokens", "columns", "padded"), [(3, 131, 131), (2, 20000, 20003), (1, 1, 4), (0, 5, 5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_sums(tokens: int, columns: int, padded: int, dtype: torch.dtype, temperature: float) -> None:
    generator = torch.Generator().manual_seed(columns)
    logits = (20 * torch.randn(tokens, padded, generator=generator)).to(DEVICE, dtype)[:, :columns]
    logits[:, : columns // 2] -= 300  # so that a later block has the maximum
    x = logits.double() / temperature
    maximum = x.amax(1) if columns and tokens else x.new_zeros(tokens)
    exponential = (x - maximum[:, None]).exp()
    expected = torch.stack([maximum, exponential.sum(1), (exponential * (x - maximum[:, None])).sum(1)])
    torch.testing.assert_close(maximum_and_sums(logits, temperature).double(), expected, rtol=1e-5, atol=1e-5)


def test_infinite_and_broken_logits() -> None:
    logits = torch.zeros(4, 10000, device=DEVICE)
    logits[0] = -torch.inf
    logits[1, :9000] = -torch.inf
    logits[2, 9999] = -torch.inf
    logits[3, 9999] = torch.nan
    maximum, exponentials, weighted = maximum_and_sums(logits, 1.0).tolist()
    assert maximum[:3] == [-math.inf, 0, 0]
    assert exponentials[1:3] == pytest.approx([1000, 9999])
    assert weighted[1:3] == pytest.approx([0, 0])
    assert math.isnan(exponentials[3]) and math.isnan(weighted[3])
