"""The largest logit of each row and the sums of a softmax, in one pass over the logits."""

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 8192


@triton.jit
def _reduce_row(  # type: ignore[no-untyped-def]
    logits, results, rows, columns, stride, temperature, BLOCK: tl.constexpr
):
    """Keep a running sum of exp(x - m), rescaled when a block has a larger m (Milakov & Gimelshein 2018)."""
    row = tl.program_id(0).to(tl.int64)
    maximum = tl.full((), -float("inf"), tl.float32)
    exponentials = tl.full((), 0, tl.float32)
    weighted = tl.full((), 0, tl.float32)
    start = 0
    while start < columns:
        column = start + tl.arange(0, BLOCK)
        x = tl.load(logits + row * stride + column, mask=column < columns, other=-float("inf")).to(tl.float32)
        x = x / temperature
        larger = tl.maximum(maximum, tl.max(x, axis=0))
        finite = tl.where(larger == -float("inf"), 0.0, larger)  # only -inf so far
        # The floor, below which exp() is 0, keeps 0 * -inf out of the sums.
        shift = tl.where(maximum - finite < -1e4, -1e4, maximum - finite)
        shifted = tl.where(x - finite < -1e4, -1e4, x - finite)
        exponential = tl.exp(shifted)
        weighted = (weighted + exponentials * shift) * tl.exp(shift) + tl.sum(exponential * shifted, axis=0)
        exponentials = exponentials * tl.exp(shift) + tl.sum(exponential, axis=0)
        maximum = larger
        start += BLOCK
    tl.store(results + row, maximum)
    tl.store(results + rows + row, exponentials)
    tl.store(results + 2 * rows + row, weighted)


def maximum_and_sums(logits: Tensor, temperature: float) -> Tensor:
    """Return m = max x, sum exp(x - m) and sum exp(x - m) (x - m) of each row, where x = logits / temperature.

    Args:
        logits: [tokens, vocabulary] in float32 or half precision.

    Returns:
        float32 [3, tokens].
    """
    if logits.stride(1) != 1:
        logits = logits.contiguous()
    results = torch.empty(3, len(logits), dtype=torch.float32, device=logits.device)
    if len(logits):
        _reduce_row[(len(logits),)](
            logits, results, *logits.shape, logits.stride(0), temperature, BLOCK=_BLOCK, num_warps=8
        )
    return results
