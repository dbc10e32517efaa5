"""Log probabilities and entropies of logits whose vocabulary is split over a tensor-parallel group.

With x = logits / temperature, m = max x, S = sum exp(x - m) and p = exp(x - m) / S over the whole vocabulary:

* log p[target] = x[target] - m - log S
* H = -sum p log p = log S - sum p (x - m)
* d log p[target] / dx = onehot(target) - p
* dH / dx = -p (log p + H)

A rank only sees its slice of the vocabulary. The forward pass needs one max all-reduce and one sum all-reduce of two or
three numbers per token; the backward pass is local. Logits are the largest tensor of a step, so they keep their
precision: copies in higher precision exist for a few tokens at a time, and the backward pass recomputes p. On a GPU
each pass over a chunk is one kernel.
"""

from typing import Any

import torch
import torch.distributed as dist
from mbridge_model.kernels import runs_kernels
from mbridge_model.patches.compiled import compiled_on_gpu
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK_ELEMENTS = {"cpu": 1 << 24, "cuda": 1 << 28}
"""Number of logits converted to float32 at a time: 64 MiB, or 1 GiB on a GPU, where a fused kernel stores none."""

# exp() of this is 0 in float32 and float64; as a floor it keeps 0 * -inf out of p log p.
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
    overwrite: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Return the natural log probability of each target, and optionally the entropy of each distribution.

    Both are differentiable once with respect to ``local_logits``. All ranks of the group must pass the same targets,
    get the same results, and must compute the same loss from them; each rank then gets the gradient of its slice.

    Args:
        local_logits: [tokens, local vocabulary], any floating dtype: slice of this rank.
        targets: int64 [tokens]: token ids in the whole vocabulary.
        group: ranks that hold the slices; None (or a group of one) if ``local_logits`` is the whole vocabulary.
        vocab_start: token id of the first column of this rank.
        vocab_size: true size of the vocabulary. Columns of ids at or above it are padding: they are treated as
            -inf and get zero gradients.
        temperature: divides the logits after their conversion to float32.
        with_entropy: whether to compute the entropy, in nats.
        overwrite: let the backward pass overwrite the logits with their gradient; they must not be read again.

    Returns:
        ``(logprobs, entropy)``, float32 [tokens] each (float64 for float64 logits); without entropy, the latter is
        None. The log probability of a target outside the vocabulary is NaN.

    Raises:
        ValueError: shapes or dtypes do not match, or the temperature is not positive.
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
    # Columns that are real tokens; the last ranks may hold only padding.
    columns = min(max(vocab_size - vocab_start, 0), local_logits.shape[1])
    logprobs, entropy = _LogprobAndEntropy.apply(
        local_logits, targets, group, vocab_start, vocab_size, columns, temperature, with_entropy, overwrite
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
        overwrite: bool,
    ) -> tuple[Tensor, Tensor | None]:
        tokens = logits.shape[0]
        dtype = _compute_dtype(logits)
        maximum = torch.full((tokens,), -torch.inf, dtype=dtype, device=logits.device)
        # A row each for sum exp, the shifted target and sum exp * shifted, so that one all-reduce sums them all.
        sums = torch.zeros(3 if with_entropy else 2, tokens, dtype=dtype, device=logits.device)
        if tokens and columns:
            found = _maximum_and_sums(logits.detach()[:, :columns], temperature, with_entropy)
            maximum, sums[0] = found[:2]
            if with_entropy:
                sums[2] = found[2]
        if group is not None:
            maximum = _to_common_maximum(sums, maximum, group)
        if columns:
            column, is_local = _local_target(targets, vocab_start, columns)
            target = logits.gather(1, column[:, None]).squeeze(1).to(dtype) / temperature - maximum
            sums[1] = torch.where(is_local, target, 0)
        if group is not None:
            dist.all_reduce(sums, group=group)

        log_sum = sums[0].log()
        in_vocabulary = (targets >= 0) & (targets < vocab_size)
        logprobs = torch.where(in_vocabulary, sums[1] - log_sum, torch.nan)
        entropy = log_sum - sums[2] / sums[0] if with_entropy else None

        ctx.save_for_backward(logits, targets, maximum + log_sum, entropy)
        ctx.set_materialize_grads(False)
        ctx.vocab_start, ctx.columns, ctx.temperature, ctx.overwrite = vocab_start, columns, temperature, overwrite
        return logprobs, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logprobs: Tensor | None, grad_entropy: Tensor | None) -> tuple[Tensor | None, ...]:
        logits, targets, log_normalizer, entropy = ctx.saved_tensors
        columns, temperature = ctx.columns, ctx.temperature
        if grad_logprobs is None and grad_entropy is None:
            return (None,) * 9
        grad_logits = logits.detach() if ctx.overwrite else logits.detach().clone()
        grad_logits[:, columns:] = 0
        if columns:
            column, is_local = _local_target(targets, ctx.vocab_start, columns)
            column = column.where(is_local, -1)
            for start, stop in _chunks(logits, columns):
                rows = slice(start, stop)
                _to_gradient(
                    grad_logits[rows, :columns],
                    log_normalizer[rows],
                    column[rows],
                    None if grad_logprobs is None else grad_logprobs[rows],
                    None if grad_entropy is None else grad_entropy[rows],
                    None if entropy is None else entropy[rows],
                    temperature,
                )
        return (grad_logits,) + (None,) * 8


def _maximum_and_sums(logits: Tensor, temperature: float, with_entropy: bool) -> list[Tensor]:
    """Return m = max x, sum exp(x - m) and, with the entropy, sum exp(x - m) (x - m) of each row."""
    if runs_kernels(logits) and logits.dtype != torch.float64:
        from mbridge_train.losses.logit_kernels import maximum_and_sums

        return list(maximum_and_sums(logits, temperature))[: 3 if with_entropy else 2]
    chunks = []
    for start, stop in _chunks(logits, logits.shape[1]):
        x = logits[start:stop].to(_compute_dtype(logits)) / temperature
        maximum = x.amax(dim=1, keepdim=True)
        shifted = x - maximum
        exponentials = shifted.exp()
        chunks.append([maximum.squeeze(1), exponentials.sum(dim=1)])
        if with_entropy:
            chunks[-1].append((exponentials * shifted.clamp(min=_LOG_FLOOR)).sum(dim=1))
    return [torch.cat(parts) for parts in zip(*chunks, strict=True)]


def _to_common_maximum(sums: Tensor, own: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Return the maximum over all ranks, and rescale `sums` of exp(x - own) to it in place."""
    common = own.clone()
    dist.all_reduce(common, dist.ReduceOp.MAX, group=group)
    sums.masked_fill_(own == -torch.inf, 0)  # only -inf here: exp(x - own) is NaN
    shift = (own - common).clamp(min=_LOG_FLOOR)
    if len(sums) == 3:
        sums[2] += sums[0] * shift
        sums[2] *= shift.exp()
    sums[0] *= shift.exp()
    return common


@compiled_on_gpu
def _to_gradient(
    logits: Tensor,
    log_normalizer: Tensor,
    column: Tensor,
    grad_logprobs: Tensor | None,
    grad_entropy: Tensor | None,
    entropy: Tensor | None,
    temperature: float,
) -> None:
    """Overwrite logits with their gradient; `column` is the column of each target, -1 if another rank holds it."""
    log_p = logits.to(log_normalizer.dtype) / temperature - log_normalizer[:, None]
    p = log_p.exp()
    # d/dx = -p * (grad_logprobs + grad_entropy * (log p + H)) + grad_logprobs at the target
    gradient = p.new_zeros(())
    if grad_entropy is not None:
        assert entropy is not None
        gradient = -p * grad_entropy[:, None] * (log_p.clamp(min=_LOG_FLOOR) + entropy[:, None])
    if grad_logprobs is not None:
        is_target = torch.arange(logits.shape[1], device=logits.device) == column[:, None]
        gradient = gradient + grad_logprobs[:, None] * (is_target.to(p.dtype) - p)
    logits.copy_(gradient / temperature)


def _compute_dtype(logits: Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def _chunks(logits: Tensor, columns: int) -> list[tuple[int, int]]:
    tokens = len(logits)
    size = max(1, CHUNK_ELEMENTS[logits.device.type] // columns)
    return [(start, min(start + size, tokens)) for start in range(0, tokens, size)]


def _local_target(targets: Tensor, vocab_start: int, columns: int) -> tuple[Tensor, Tensor]:
    """Return the column of each target, clamped to a valid one, and whether this rank holds it."""
    column = targets - vocab_start
    is_local = (column >= 0) & (column < columns)
    return column.clamp(0, columns - 1), is_local
