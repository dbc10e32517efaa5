"""One training sequence, and the loss weights that turn a list of them into one global batch.

A *global batch* is a plain ``list[Sample]`` with all samples of one optimizer step. Every rank holds all of it (token
ids are small) and therefore derives the same split without communication.

Any aggregation of a per-token loss is a choice of weights over the global batch: ``loss = sum(weights * token_loss)``.
The weights are fixed before the batch is cut into micro-batches, so the loss and its gradient do not depend on
micro-batch size, packing or data parallelism, and partial results combine by addition alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Protocol, get_args

import torch
from torch import Tensor

if TYPE_CHECKING:
    from mbridge_model import VisionInputs

Aggregation = Literal["token-mean", "seq-mean-token-sum", "seq-mean-token-mean"]
"""How a per-token loss is reduced to one number; see :func:`aggregation_weights`."""


class LazyVision(Protocol):
    """Images and videos that are materialized only on the ranks that run their sample (`Engine.reads_vision`)."""

    grid_thw: Tensor
    """int64 [items, 3], as in `VisionInputs`; present on every rank."""

    def materialize(self) -> "VisionInputs":
        """Return the inputs with their pixels. Called when the micro-batch is collated."""
        ...


@dataclass(kw_only=True, slots=True)
class Sample:
    """One sequence. All tensors are on the CPU; all but those of images have the same length, at least 1.

    Per-token values are aligned to their token *as a target*: entry ``t`` concerns the prediction of ``tokens[t]`` from
    ``tokens[:t]``. Nothing predicts the first token, so ``weights[0]`` is 0. Fields may be NaN where the weight is 0,
    so a loss must not read them there. Raises `ValueError` for a wrong dtype, shape or device, a negative or non-finite
    weight, a trained first token, and a field that is not finite on a trained token.
    """

    tokens: Tensor
    """int64 [length]: token ids."""
    weights: Tensor
    """float32 [length]: weight of the token's loss in the global batch; 0 for tokens that are not trained."""
    fields: dict[str, Tensor] = field(default_factory=dict)
    """float32 [length] each: per-token values by the name under which the loss reads them, such as `advantages`. All
    samples of a batch have the same names."""
    vision: "VisionInputs | LazyVision | None" = None
    """Images and videos, in the order of their placeholders among the tokens."""
    position_ids: Tensor | None = None
    """int64 [3, length]: time, height and width (`mbridge_model.mrope_position_ids`); None: positions count tokens."""

    def __post_init__(self) -> None:
        _check_tensor("tokens", self.tokens, torch.int64, None)
        _check_tensor("weights", self.weights, torch.float32, self.length)
        if not bool(((self.weights >= 0) & self.weights.isfinite()).all()):
            raise ValueError("Sample.weights must be finite and not negative")
        if self.weights[0] != 0:
            raise ValueError(f"Sample.weights[0] is {self.weights[0].item()}, must be 0: nothing predicts token 0")
        trained = self.weights > 0
        for name, value in self.fields.items():
            _check_tensor(f"fields[{name!r}]", value, torch.float32, self.length)
            if not bool(value[trained].isfinite().all()):
                raise ValueError(f"Sample.fields[{name!r}] is not finite on a token with a weight")
        if self.position_ids is not None and self.position_ids.shape != (3, self.length):
            raise ValueError(f"Sample.position_ids is {list(self.position_ids.shape)} for {self.length} tokens")

    @property
    def length(self) -> int:
        """Number of tokens, prompt included."""
        return self.tokens.numel()


def common_fields(samples: Sequence[Sample]) -> list[str]:
    """Return the sorted names of the samples' fields; raise `ValueError` if a sample lacks one that another one has."""
    names: dict[str, int] = {name: index for index, sample in enumerate(samples) for name in sample.fields}
    for index, sample in enumerate(samples):
        for name, owner in names.items():
            if name not in sample.fields:
                raise ValueError(
                    f"sample {index} of the batch has no field {name!r}, which sample {owner} has: give it to all "
                    "samples or to none"
                )
    return sorted(names)


def _check_tensor(name: str, value: Tensor, dtype: torch.dtype, length: int | None) -> None:
    if value.dtype != dtype or value.dim() != 1 or value.device.type != "cpu" or value.numel() == 0:
        raise ValueError(
            f"Sample.{name} must be a non-empty {dtype} CPU tensor with one dimension, "
            f"got {value.dtype} {list(value.shape)} on {value.device}"
        )
    if length is not None and value.numel() != length:
        raise ValueError(f"Sample.{name} has {value.numel()} entries for {length} tokens")


def aggregation_weights(loss_masks: Sequence[Tensor], mode: Aggregation) -> list[Tensor]:
    """Return the weights for which ``sum(weights * token_loss)`` over the global batch is the chosen aggregate.

    With T trained tokens in the global batch, len_i of them in sequence i, and N sequences that have at least one:

    ======================= ==================== ==================================================================
    mode                    weight of a token    meaning
    ======================= ==================== ==================================================================
    ``token-mean``          1 / T                all tokens count equally (DAPO, arXiv 2503.14476, 3.3)
    ``seq-mean-token-sum``  1 / N                mean over sequences of their summed loss (REINFORCE)
    ``seq-mean-token-mean`` 1 / (N * len_i)      all sequences count equally (GRPO, arXiv 2402.03300, eq. 3)
    ======================= ==================== ==================================================================

    A sequence without a trained token (an empty answer, or one that was filtered out) has no loss to average: its
    weights are 0, and it does not count in N. If no sequence has a trained token, the loss and its gradient are 0.

    Args:
        loss_masks: one per sequence, bool or 0/1 of any dtype, [length]; true for trained tokens. The first entry must
            be false.

    Returns:
        float32 [length] CPU tensors, one per sequence, in the same order.

    Raises:
        ValueError: unknown mode; a mask is not one-dimensional, not 0/1, or true at position 0.
    """
    masks = [_as_bool(index, mask) for index, mask in enumerate(loss_masks)]
    counts = [int(mask.sum()) for mask in masks]
    trained_sequences = sum(count > 0 for count in counts)
    match mode:
        case "token-mean":
            shares = [sum(counts)] * len(counts)
        case "seq-mean-token-sum":
            shares = [trained_sequences] * len(counts)
        case "seq-mean-token-mean":
            shares = [trained_sequences * count for count in counts]
        case _:
            raise ValueError(f"unknown loss aggregation {mode!r}: use one of {', '.join(get_args(Aggregation))}")
    return [mask.to(torch.float32) * (1 / max(1, share)) for mask, share in zip(masks, shares, strict=True)]


def _as_bool(index: int, mask: Tensor) -> Tensor:
    result = mask.to("cpu", torch.bool)
    if mask.dim() != 1 or mask.numel() == 0 or not torch.equal(result.to(mask.dtype), mask.cpu()):
        raise ValueError(f"loss mask {index} must be a non-empty one-dimensional tensor of 0 and 1")
    if result[0]:
        raise ValueError(f"loss mask {index} trains token 0, which nothing predicts")
    return result
