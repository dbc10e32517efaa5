"""Cutting a global batch into micro-batches, and micro-batches into model inputs.

Two independent halves:

* :func:`plan_micro_batches` decides which sample goes where. It sees lengths only and is deterministic, so every rank
  computes the same plan and none has to be told.
* :func:`collate_dense` and :func:`collate_packed` lay the samples of one micro-batch out as one tensor, a row per
  sample or all samples end to end (THD), and :meth:`ModelInputs.unpack` brings results back into per-sample tensors.

Causal attention lets a token see earlier tokens only, so padding on the right of a sample changes nothing before it.
"""

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, fields, replace
from typing import Self

import torch
from mbridge_model import VisionInputs
from mbridge_model.transfer import to_device
from torch import Tensor

from mbridge_train.engine.batch import Sample
from mbridge_train.errors import TrainError

Plan = list[list[list[int]]]
"""``plan[data_parallel_rank][micro_batch]`` is a list of sample indices, possibly empty."""


def plan_micro_batches(
    lengths: Sequence[int],
    data_parallel_size: int,
    *,
    micro_batch_size: int | None = None,
    token_budget: int | None = None,
    pad_each_to_multiple: int = 1,
) -> Plan:
    """Spread samples over data-parallel ranks, evenly by tokens, and cut each rank's share into micro-batches.

    Every sample is used exactly once and all ranks get the same number of micro-batches, the smallest that fits; if
    there are fewer samples than places, some micro-batches are empty lists. Longest-processing-time-first assignment
    (Graham 1969): the longest sample left goes to the rank with the fewest tokens so far.

    Args:
        lengths: tokens of each sample.
        data_parallel_size: number of ranks to spread over.
        micro_batch_size: at most this many samples in a micro-batch. Samples of similar length share one, which
            keeps padding small.
        token_budget: instead, at most this many tokens in a micro-batch, the sum of its lengths, for packed batches.
            Micro-batches of a rank are evened out by tokens.
        pad_each_to_multiple: count lengths as if rounded up to a multiple of this.

    Raises:
        TrainError: no samples; a sample that alone exceeds ``token_budget``.
        ValueError: not exactly one of ``micro_batch_size`` and ``token_budget``, or a size below 1.
    """
    limit = micro_batch_size if token_budget is None else token_budget
    if (micro_batch_size is None) == (token_budget is None) or limit is None:
        raise ValueError("give exactly one of micro_batch_size and token_budget")
    if limit < 1 or data_parallel_size < 1 or pad_each_to_multiple < 1 or min(lengths, default=1) < 1:
        raise ValueError("sizes and lengths must be at least 1")
    if not lengths:
        raise TrainError("the global batch has no samples: check the data filter and global_batch_size")
    padded = [round_up(length, pad_each_to_multiple) for length in lengths]
    # Longest first; equal lengths in order of index, so that the order is the same everywhere.
    order = sorted(range(len(padded)), key=lambda index: (-padded[index], index))

    if micro_batch_size is not None:
        count = -(-len(padded) // (data_parallel_size * micro_batch_size))
        shares = _spread(order, padded, data_parallel_size, most=count * micro_batch_size)
        plan = [[share[m * micro_batch_size : (m + 1) * micro_batch_size] for m in range(count)] for share in shares]
    else:
        assert token_budget is not None
        longest = order[0]
        if padded[longest] > token_budget:
            raise TrainError(
                f"sample {longest} has {lengths[longest]} tokens ({padded[longest]} with padding), more than the "
                f"micro-batch token budget of {token_budget}: raise the budget or shorten the sequences"
            )
        shares = _spread(order, padded, data_parallel_size)
        packed = [_first_fit(share, padded, token_budget) for share in shares]
        count = max(len(micro_batches) for micro_batches in packed)
        plan = [
            _even_out(share, padded, micro_batches, count, token_budget)
            for share, micro_batches in zip(shares, packed, strict=True)
        ]
    return [[sorted(micro_batch) for micro_batch in micro_batches] for micro_batches in plan]


def padding_share(plan: Plan, lengths: Sequence[int], *, packed: bool, pad_each_to_multiple: int = 1) -> float:
    """Share of the token places in all micro-batches of all ranks that hold padding: 0.0 is none.

    Args:
        plan: from `plan_micro_batches`.
        lengths: tokens of each sample.
        packed: samples stand end to end (`collate_packed`), not in rows as long as the longest (`collate_dense`).
        pad_each_to_multiple: of each sample if packed, else of the rows.
    """
    micro_batches = [micro_batch for rank in plan for micro_batch in rank if micro_batch]
    places = 0
    for micro_batch in micro_batches:
        padded = [round_up(lengths[index], pad_each_to_multiple) for index in micro_batch]
        places += sum(padded) if packed else len(padded) * max(padded)
    return 1 - sum(lengths) / places


def round_up(value: int, multiple: int) -> int:
    """Smallest multiple of ``multiple`` that is not below ``value``."""
    return -(-value // multiple) * multiple


def _spread(order: list[int], lengths: list[int], count: int, most: int | None = None) -> list[list[int]]:
    """Deal ``order`` (longest first) into ``count`` shares of at most ``most`` samples, even by tokens."""
    shares: list[list[int]] = [[] for _ in range(count)]
    totals = [0] * count
    for index in order:
        open_shares = [share for share in range(count) if most is None or len(shares[share]) < most]
        smallest = min(open_shares, key=lambda share: (totals[share], share))
        shares[smallest].append(index)
        totals[smallest] += lengths[index]
    return shares


def _first_fit(order: list[int], lengths: list[int], budget: int) -> list[list[int]]:
    """Pack ``order`` (longest first) into few bins of at most ``budget`` tokens: first-fit decreasing."""
    bins: list[list[int]] = []
    room: list[int] = []
    for index in order:
        target = next((b for b, left in enumerate(room) if left >= lengths[index]), len(bins))
        if target == len(bins):
            bins.append([])
            room.append(budget)
        bins[target].append(index)
        room[target] -= lengths[index]
    return bins


def _even_out(
    order: list[int], lengths: list[int], fitted: list[list[int]], count: int, budget: int
) -> list[list[int]]:
    """``count`` bins even by tokens if those keep to the budget, else the fitted ones and empty bins after them."""
    even = _spread(order, lengths, count)
    if all(sum(lengths[index] for index in micro_batch) <= budget for micro_batch in even):
        return even
    return fitted + [[] for _ in range(count - len(fitted))]


@dataclass(kw_only=True, slots=True)
class ModelInputs:
    """One micro-batch as a causal language model takes it, [batch, seq]; a packed one is [1, total].

    The logits at a position predict the *next* token, so everything about token ``t`` of a sample sits at the
    position of its token ``t - 1``. The last position of every sample and all padding have target 0 and weight 0.
    """

    tokens: Tensor
    """int64 [batch, seq]; 0 in padding."""
    position_ids: Tensor
    """int64 [batch, seq]: position within the sample, counted on through its padding. [3, batch, seq] (time, height,
    width) if a sample has positions of its own; padding then has any."""
    targets: Tensor
    """int64 [batch, seq]: the token that the logits here predict."""
    weights: Tensor
    """float32 [batch, seq]: loss weight of the target."""
    advantages: Tensor | None
    """float32 [batch, seq]; None if no sample has any. Likewise the next two."""
    old_logprobs: Tensor | None
    reference_logprobs: Tensor | None
    cu_seqlens: Tensor | None
    """int32 [segments + 1]: running sum of segment lengths without padding. None in a dense batch, as the next two."""
    cu_seqlens_padded: Tensor | None
    """int32 [segments + 1]: where segments start in the packed row; the last entry is ``total``."""
    max_seqlen: int | None
    """Longest padded segment."""
    sample_starts: list[int]
    """Position of each sample's first token in the flattened [batch * seq] layout."""
    sample_lengths: list[int]
    """Tokens of each sample."""
    vision: VisionInputs | None = None
    """Images and videos of all samples, in the order of their placeholders; None if there are none."""

    def unpack(self, values: Tensor) -> list[Tensor]:
        """Per-position results back to samples.

        Args:
            values: [batch, seq] or flattened [batch * seq], any dtype: a value of the target at each position.

        Returns:
            One tensor [length] per sample, aligned to tokens as in :class:`Sample`; entry 0 is 0.

        Raises:
            ValueError: the number of values is not that of the positions.
        """
        if values.numel() != self.tokens.numel():
            raise ValueError(f"{list(values.shape)} values for {list(self.tokens.shape)} positions")
        flat = values.reshape(-1)
        first = flat.new_zeros(1)
        return [
            torch.cat([first, flat[start : start + length - 1]])
            for start, length in zip(self.sample_starts, self.sample_lengths, strict=True)
        ]

    def to(self, device: torch.device | str) -> Self:
        """The same micro-batch with its tensors on ``device``, which the host does not wait for."""
        moved = copy(self)
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Tensor):
                setattr(moved, field.name, to_device(value, device))
        if self.vision is not None:
            moved.vision = self.vision.to(device)
        return moved


def collate_dense(samples: Sequence[Sample], pad_to_multiple: int = 1, *, with_vision: bool = True) -> ModelInputs:
    """One row per sample, padded on the right to the longest, rounded up to ``pad_to_multiple``.

    An empty micro-batch becomes one row of padding with zero weight and all fields present, so that a rank without
    work runs the same code and collectives as the others. `with_vision=False` leaves images and videos out.

    Raises:
        ValueError: some samples have advantages (old, reference log probabilities) and others have not.
    """
    width = round_up(max((sample.length for sample in samples), default=1), pad_to_multiple)
    rows = max(len(samples), 1)
    starts = [row * width for row in range(len(samples))]
    return _lay_out(samples, starts, torch.arange(width).repeat(rows, 1), with_vision)


def collate_packed(
    samples: Sequence[Sample], pad_each_to_multiple: int = 1, *, with_vision: bool = True
) -> ModelInputs:
    """All samples end to end in one row (THD), each padded on the right to ``pad_each_to_multiple``.

    An empty micro-batch is one sequence of padding, with zero weight and all fields present.

    Args:
        samples: those of one micro-batch.
        pad_each_to_multiple: for sequence and context parallelism, which split every sample evenly.
        with_vision: False leaves images and videos out.

    Raises:
        ValueError: as in :func:`collate_dense`.
    """
    lengths = [sample.length for sample in samples] or [pad_each_to_multiple]
    segments = [round_up(length, pad_each_to_multiple) for length in lengths]
    cu_seqlens, cu_seqlens_padded = (
        torch.tensor([0, *sizes], dtype=torch.int32).cumsum(0, dtype=torch.int32) for sizes in (lengths, segments)
    )
    position_ids = torch.cat([torch.arange(segment) for segment in segments]).unsqueeze(0)
    inputs = _lay_out(samples, cu_seqlens_padded[: len(samples)].tolist(), position_ids, with_vision)
    return replace(inputs, cu_seqlens=cu_seqlens, cu_seqlens_padded=cu_seqlens_padded, max_seqlen=max(segments))


def _lay_out(samples: Sequence[Sample], starts: list[int], position_ids: Tensor, with_vision: bool) -> ModelInputs:
    """Dense inputs in the shape of ``position_ids``, sample ``i`` from flat position ``starts[i]`` on."""

    def place(name: str, first: int, dtype: torch.dtype) -> Tensor:
        """Attribute ``name`` of all samples from their token ``first`` on; zeros around."""
        row = torch.zeros(position_ids.numel(), dtype=dtype)
        for sample, start in zip(samples, starts, strict=True):
            row[start : start + sample.length - first] = getattr(sample, name)[first:]
        return row.view(position_ids.shape)

    def place_optional(name: str) -> Tensor | None:
        missing = sum(getattr(sample, name) is None for sample in samples)
        if 0 < missing < len(samples):
            raise ValueError(f"{missing} of {len(samples)} samples have no {name}: give it to all or none")
        return None if missing else place(name, 1, torch.float32)

    return ModelInputs(
        tokens=place("tokens", 0, torch.int64),
        position_ids=_place_positions(samples, starts, position_ids),
        targets=place("tokens", 1, torch.int64),
        weights=place("weights", 1, torch.float32),
        advantages=place_optional("advantages"),
        old_logprobs=place_optional("old_logprobs"),
        reference_logprobs=place_optional("reference_logprobs"),
        cu_seqlens=None,
        cu_seqlens_padded=None,
        max_seqlen=None,
        sample_starts=starts,
        sample_lengths=[sample.length for sample in samples],
        vision=_place_vision(samples) if with_vision else None,
    )


def _place_vision(samples: Sequence[Sample]) -> VisionInputs | None:
    parts = [sample.vision for sample in samples if sample.vision is not None]
    return VisionInputs.concatenate([part if isinstance(part, VisionInputs) else part.materialize() for part in parts])


def _place_positions(samples: Sequence[Sample], starts: list[int], position_ids: Tensor) -> Tensor:
    """Counted positions, with those that samples have of their own in their places: then in three dimensions."""
    if all(sample.position_ids is None for sample in samples):
        return position_ids
    flat = position_ids.reshape(1, -1).repeat(3, 1)
    for sample, start in zip(samples, starts, strict=True):
        if sample.position_ids is not None:
            flat[:, start : start + sample.length] = sample.position_ids
    return flat.view(3, *position_ids.shape)
