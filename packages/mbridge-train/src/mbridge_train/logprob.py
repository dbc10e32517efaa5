"""Log probabilities and entropies from logits whose vocabulary is split over a tensor-parallel group.

With x = logits / temperature, m = max x, S = sum exp(x - m) and p = exp(x - m) / S over the whole vocabulary:

* log p[target] = x[target] - m - log S
* H = -sum p log p = log S - sum p (x - m)
* d log p[target] / dx = onehot(target) - p
* dH / dx = -p (log p + H)

No rank ever sees more than its own slice of the vocabulary: the forward pass is one max all-reduce and one sum
all-reduce of two or three numbers a token, the backward pass is local. Logits are the largest tensor of a step, so
they are kept in the precision they came in; higher-precision copies exist for a few tokens at a time, and the backward
pass computes p anew instead of keeping it.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK_ELEMENTS = 1 << 24
"""Logits that are converted to float32 at a time: 64 MiB."""

# exp() of anything below is 0 in float32 and float64; a floor keeps 0 * -inf out of p log p.
_LOG_FLOOR = -1e4


def vocab_parallel_logprob_and_entropy(
    local_logits: Tensor,
    targets: Tensor,
    *,
    group: dist.ProcessGroup | None,
    vocab_start: int,
    vocab_size: int,
    temperature: float = 1.0,
    with_entropy: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Natural log probability of each target, and optionally the entropy of each distribution.

    Both are differentiable once with respect to ``local_logits``. All ranks of the group must call it with the same
    number of tokens and the same targets, and get the same results; the gradient that a rank gets is that of its own
    slice, under the usual condition that all ranks go on to compute the same loss.

    Args:
        local_logits: float [tokens, local vocabulary]: this rank's slice, any floating dtype.
        targets: int64 [tokens]: token ids in the whole vocabulary.
        group: ranks that hold the slices; None (or a group of one) where ``local_logits`` is the whole vocabulary.
        vocab_start: token id of the first column of this rank.
        vocab_size: true size of the vocabulary. Columns of ids from it on are padding: they take no part, as if
            their logits were -inf, and get zero gradients.
        temperature: divides the logits, after their conversion to float32.
        with_entropy: whether to compute the entropy, in nats; it costs one more pass over the logits.

    Returns:
        ``(logprobs, entropy)``: float32 [tokens] (float64 for float64 logits), and the same or None. The log
        probability of a target outside the vocabulary is NaN.

    Raises:
        ValueError: shapes or dtypes that do not fit, or a temperature that is not positive.
    """
    if local_logits.dim() != 2 or targets.shape != local_logits.shape[:1] or targets.dtype != torch.int64:
        raise ValueError(
            f"need logits [tokens, vocabulary] and int64 targets [tokens], got {list(local_logits.shape)} and "
            f"{targets.dtype} {list(targets.shape)}"
        )
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    if group is not None and group.size() == 1:
        group = None
    # Columns that are real tokens; a rank at the end may hold nothing but padding.
    columns = min(max(vocab_size - vocab_start, 0), local_logits.shape[1])
    logprobs, entropy = _LogprobAndEntropy.apply(
        local_logits, targets, group, vocab_start, vocab_size, columns, temperature, with_entropy
    )
    return logprobs, entropy if with_entropy else None


class _LogprobAndEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        targets: Tensor,
        group: dist.ProcessGroup | None,
        vocab_start: int,
        vocab_size: int,
        columns: int,
        temperature: float,
        with_entropy: bool,
    ) -> tuple[Tensor, Tensor | None]:
        tokens = logits.shape[0]
        dtype = _compute_dtype(logits)
        # Conversion and division are monotone, so the maximum can be taken in the original precision.
        if columns:
            maximum = logits[:, :columns].amax(dim=1).to(dtype) / temperature
        else:
            maximum = torch.full((tokens,), -torch.inf, dtype=dtype, device=logits.device)
        if group is not None:
            dist.all_reduce(maximum, dist.ReduceOp.MAX, group=group)

        # One row each, so that a single all-reduce sums all of them: sum exp, the target, and sum exp * shifted.
        sums = torch.zeros(3 if with_entropy else 2, tokens, dtype=dtype, device=logits.device)
        if columns:
            for start, stop in _chunks(tokens, columns):
                shifted = _scaled(logits[start:stop, :columns], dtype, temperature)
                shifted -= maximum[start:stop, None]
                if with_entropy:
                    shifted.clamp_(min=_LOG_FLOOR)
                    exponentials = shifted.exp()
                    sums[0, start:stop] = exponentials.sum(dim=1)
                    sums[2, start:stop] = exponentials.mul_(shifted).sum(dim=1)
                else:
                    sums[0, start:stop] = shifted.exp_().sum(dim=1)
            column, is_local = _local_target(targets, vocab_start, columns)
            target = _scaled(logits.gather(1, column[:, None]).squeeze(1), dtype, temperature) - maximum
            sums[1] = torch.where(is_local, target, 0)
        if group is not None:
            dist.all_reduce(sums, group=group)

        log_sum = sums[0].log()
        in_vocabulary = (targets >= 0) & (targets < vocab_size)
        logprobs = torch.where(in_vocabulary, sums[1] - log_sum, torch.nan)
        entropy = log_sum - sums[2] / sums[0] if with_entropy else None

        ctx.save_for_backward(logits, targets, maximum + log_sum, entropy)
        ctx.set_materialize_grads(False)
        ctx.vocab_start, ctx.columns, ctx.temperature = vocab_start, columns, temperature
        return logprobs, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logprobs: Tensor | None, grad_entropy: Tensor | None) -> tuple[Tensor | None, ...]:
        logits, targets, log_normalizer, entropy = ctx.saved_tensors
        columns, temperature = ctx.columns, ctx.temperature
        if grad_logprobs is None and grad_entropy is None:
            return (None,) * 8
        dtype = _compute_dtype(logits)
        grad_logits = torch.empty_like(logits)
        grad_logits[:, columns:] = 0
        if columns:
            column, is_local = _local_target(targets, ctx.vocab_start, columns)
            for start, stop in _chunks(logits.shape[0], columns):
                log_p = _scaled(logits[start:stop, :columns], dtype, temperature)
                log_p -= log_normalizer[start:stop, None]
                p = log_p.exp()
                # d/dx = -p * (grad_logprobs + grad_entropy * (log p + H)) + grad_logprobs at the target
                if grad_entropy is None:
                    assert grad_logprobs is not None
                    factor = grad_logprobs[start:stop, None]
                else:
                    factor = log_p.clamp_(min=_LOG_FLOOR).add_(entropy[start:stop, None])
                    factor *= grad_entropy[start:stop, None]
                    if grad_logprobs is not None:
                        factor += grad_logprobs[start:stop, None]
                gradient = p.mul_(factor).neg_()
                if grad_logprobs is not None:
                    at_target = torch.where(is_local[start:stop], grad_logprobs[start:stop], 0)
                    gradient.scatter_add_(1, column[start:stop, None], at_target[:, None])
                grad_logits[start:stop, :columns] = gradient.div_(temperature)
        return (grad_logits,) + (None,) * 7


def _compute_dtype(logits: Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def _scaled(logits: Tensor, dtype: torch.dtype, temperature: float) -> Tensor:
    """A new tensor in ``dtype``, divided by the temperature."""
    return logits.to(dtype, copy=True).div_(temperature)


def _chunks(tokens: int, columns: int) -> list[tuple[int, int]]:
    size = max(1, CHUNK_ELEMENTS // columns)
    return [(start, min(start + size, tokens)) for start in range(0, tokens, size)]


def _local_target(targets: Tensor, vocab_start: int, columns: int) -> tuple[Tensor, Tensor]:
    """Column of each target, clamped to a valid one, and whether this rank holds it."""
    column = targets - vocab_start
    is_local = (column >= 0) & (column < columns)
    return column.clamp(0, columns - 1), is_local
