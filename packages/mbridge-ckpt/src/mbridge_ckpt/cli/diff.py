"""Compare the parameters of two checkpoints, whatever layouts they were written under."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from mbridge_ckpt.store.checkpoint import open_checkpoint
from mbridge_ckpt.store.verify import require_whole
from mbridge_ckpt.store.whole_model import MASTER, MODEL, MOMENTS, WholeModel

KINDS = (MODEL, MASTER, *MOMENTS)


@dataclass(frozen=True, slots=True)
class Difference:
    """One parameter that differs: the largest absolute difference, and the norm of the difference relative to that of
    the first, both in float64. Both are None if shape or dtype differ or one side lacks it, as `reason` says.
    """

    kind: str
    name: str
    reason: str
    largest: float | None = None
    relative: float | None = None


def diff(first: str | Path, second: str | Path, *, progress: Callable[[int], None] | None = None) -> list[Difference]:
    """Compare weights and optimizer state tensor by tensor, by bits first; empty if all are equal.

    Padding rows of a vocabulary do not count. Memory: two whole tensors and their difference. `progress` gets the bytes
    of each file verified and of each tensor compared. Raises LayoutError for checkpoints whose parameters have no
    placements (compare those file by file), CorruptCheckpointError for a damaged one: damage is no difference.
    """
    import torch

    found: list[Difference] = []
    with WholeModel(open_checkpoint(first)) as one, WholeModel(open_checkpoint(second)) as other:
        for side in (one, other):
            require_whole(side.checkpoint.path, only_needed_to_resume=True, progress=progress)
        copies = one.copied_names() | other.copied_names()
        for name in dict.fromkeys([*one.parameters, *other.parameters]):
            if name in copies:
                continue
            for kind in KINDS:
                here, there = (name in side.parameters and side.has(kind, name) for side in (one, other))
                if here != there:
                    found.append(Difference(kind, name, f"only in the {'first' if here else 'second'}"))
                if not (here and there):
                    continue
                rows = one.parameters[name].placement.vocabulary_rows
                a, b = one.read(kind, name, rows=rows), other.read(kind, name, rows=rows)
                if progress is not None:
                    progress(a.nbytes + b.nbytes)
                if (a.shape, a.dtype) != (b.shape, b.dtype):
                    reason = f"{str(a.dtype)[6:]}{list(a.shape)} and {str(b.dtype)[6:]}{list(b.shape)}"
                    found.append(Difference(kind, name, reason))
                elif not torch.equal(a.view(torch.uint8) if a.dim() else a, b.view(torch.uint8) if b.dim() else b):
                    delta = a.double() - b.double()
                    scale = float(a.double().norm()) or 1.0
                    found.append(
                        Difference(kind, name, "values", float(delta.abs().max()), float(delta.norm()) / scale)
                    )
    return found
