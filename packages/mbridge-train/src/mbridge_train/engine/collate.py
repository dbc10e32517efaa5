"""Collate the samples of a micro-batch into model inputs, and cut results back into per-sample tensors.

Samples are laid out in one tensor, one row per sample or end to end (THD). Attention is causal, so padding on the right
of a sample does not change the results of its tokens.
"""

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, fields
from itertools import accumulate
from typing import Self

import torch
from mbridge_model import VisionInputs
from mbridge_model.vision.inputs import to_device
from torch import Tensor

from mbridge_train.engine.batch import Sample, common_fields
from mbridge_train.engine.micro_batches import round_up


@dataclass(kw_only=True, slots=True)
class ModelInputs:
    """One micro-batch for a causal language model, [batch, seq]; packed: [1, total].

    The logits at a position predict the *next* token, so the values of token ``t`` of a sample are at the position of
    its token ``t - 1``. The last position of every sample and all padding have target 0 and weight 0.
    """

    tokens: Tensor
    """int64 [batch, seq]; 0 in padding."""
    position_ids: Tensor
    """int64 [batch, seq]: position within the sample, counting its padding. [3, batch, seq] (time, height, width) if a
    sample has its own positions; those of padding are then arbitrary."""
    targets: Tensor
    """int64 [batch, seq]: the token that the logits here predict."""
    weights: Tensor
    """float32 [batch, seq]: loss weight of the target."""
    fields: dict[str, Tensor]
    """float32 [batch, seq] each: `Sample.fields` of the targets by name; 0 in padding."""
    sample_starts: list[int]
    """Position of each sample's first token in the flattened [batch * seq] layout."""
    sample_lengths: list[int]
    """Number of tokens of each sample."""
    cu_seqlens: Tensor | None = None
    """int32 [segments + 1]: cumulative sum of unpadded segment lengths. None in a dense batch, like the next two."""
    cu_seqlens_padded: Tensor | None = None
    """int32 [segments + 1]: starts of the segments in the packed row, and ``total``."""
    max_seqlen: int | None = None
    """Length of the longest padded segment."""
    vision: VisionInputs | None = None
    """Images and videos of all samples, in the order of their placeholders; None without any."""

    def unpack(self, values: Tensor) -> list[Tensor]:
        """Cut per-position results into samples.

        Args:
            values: [batch * seq, ...], any dtype: a value of the target at each position.

        Returns:
            One tensor [length, ...] per sample, aligned to tokens as in :class:`Sample`; entry 0 is 0.

        Raises:
            ValueError: the numbers of values and positions differ.
        """
        if len(values) != self.tokens.numel():
            raise ValueError(f"{list(values.shape)} values for {list(self.tokens.shape)} positions")
        first = torch.zeros_like(values[:1])
        return [
            torch.cat([first, values[start : start + length - 1]])
            for start, length in zip(self.sample_starts, self.sample_lengths, strict=True)
        ]

    def to(self, device: torch.device | str) -> Self:
        """Return the micro-batch with its tensors on ``device``, without waiting for the copies."""
        moved = copy(self)
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Tensor):
                setattr(moved, field.name, to_device(value, device))
        moved.fields = {name: to_device(value, device) for name, value in self.fields.items()}
        if self.vision is not None:
            moved.vision = self.vision.to(device)
        return moved


def collate(
    samples: Sequence[Sample],
    *,
    packed: bool,
    pad_to_multiple: int = 1,
    field_names: Sequence[str] | None = None,
    with_vision: bool = True,
) -> ModelInputs:
    """Collate the samples of a micro-batch.

    An empty micro-batch becomes one sequence of padding with zero weight and all fields, so that a rank without work
    runs the same code and collectives as the others.

    Args:
        packed: whether to lay the samples end to end in one row (THD), each padded on the right, or in a row each,
            padded on the right to the longest one.
        pad_to_multiple: padded lengths are multiples of this, so that sequence and context parallelism can split them.
        field_names: fields of the global batch, for a micro-batch that may be empty; None: fields of `samples`.
        with_vision: whether to materialize images and videos.

    Raises:
        ValueError: a sample lacks a field that others have.
    """
    lengths = [sample.length for sample in samples] or [pad_to_multiple]
    segments = [round_up(length, pad_to_multiple) for length in lengths]
    if not packed:
        segments = [max(segments)] * len(segments)
    boundaries = [0, *accumulate(segments)]
    starts = boundaries[: len(samples)]
    position_ids = torch.cat([torch.arange(segment) for segment in segments]).view(1 if packed else len(segments), -1)

    def place(values: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        row = torch.zeros(position_ids.numel(), dtype=dtype)
        for value, start in zip(values, starts, strict=True):
            row[start : start + len(value)] = value
        return row.view(position_ids.shape)

    names = common_fields(samples) if field_names is None else field_names
    visions = [sample.vision for sample in samples if sample.vision is not None and with_vision]
    return ModelInputs(
        tokens=place([sample.tokens for sample in samples], torch.int64),
        position_ids=_place_positions(samples, starts, position_ids),
        targets=place([sample.tokens[1:] for sample in samples], torch.int64),
        weights=place([sample.weights[1:] for sample in samples], torch.float32),
        fields={name: place([sample.fields[name][1:] for sample in samples], torch.float32) for name in names},
        sample_starts=starts,
        sample_lengths=[sample.length for sample in samples],
        cu_seqlens=torch.tensor([0, *accumulate(lengths)], dtype=torch.int32) if packed else None,
        cu_seqlens_padded=torch.tensor(boundaries, dtype=torch.int32) if packed else None,
        max_seqlen=max(segments) if packed else None,
        vision=VisionInputs.concatenate(
            [part if isinstance(part, VisionInputs) else part.materialize() for part in visions]
        ),
    )


def _place_positions(samples: Sequence[Sample], starts: list[int], position_ids: Tensor) -> Tensor:
    """Return ``position_ids``, or three dimensions of them with the samples' own if any sample has its own."""
    if all(sample.position_ids is None for sample in samples):
        return position_ids
    flat = position_ids.reshape(1, -1).repeat(3, 1)
    for sample, start in zip(samples, starts, strict=True):
        if sample.position_ids is not None:
            flat[:, start : start + sample.length] = sample.position_ids
    return flat.view(3, *position_ids.shape)
