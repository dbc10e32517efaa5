"""Which rows a batch holds, as arithmetic: a run resumes at any step, and nothing is replayed."""

from dataclasses import dataclass
from functools import lru_cache

import numpy


@dataclass(frozen=True, kw_only=True, slots=True)
class RowOrder:
    """Each epoch has every row once, in an order that depends on `(seed, epoch)` alone.

    A batch goes over the end of an epoch into the next one, so all have the same size, but for the last of a finite
    number of epochs.

    Attributes:
        size: rows of the data.
        batch_size: rows of a batch.
        seed: None: rows in the order of the files.
        epochs: passes over the rows; None: without end.
    """

    size: int
    batch_size: int
    seed: int | None
    epochs: int | None = None

    def rows(self, step: int) -> list[int]:
        """Indices of the rows of batch `step`, from 0; none behind the last epoch."""
        first, end = step * self.batch_size, (step + 1) * self.batch_size
        if self.epochs is not None:
            end = min(end, self.epochs * self.size)
        return [self._row(ordinal) for ordinal in range(first, end)]

    def epoch(self, step: int) -> int:
        """The epoch of the first row of batch `step`, from 0."""
        return step * self.batch_size // self.size

    def _row(self, ordinal: int) -> int:
        epoch, position = divmod(ordinal, self.size)
        return position if self.seed is None else int(_permutation(self.size, self.seed, epoch)[position])


@lru_cache(maxsize=2)
def _permutation(size: int, seed: int, epoch: int) -> "numpy.typing.NDArray[numpy.int64]":
    return numpy.random.default_rng([seed, epoch]).permutation(size)
