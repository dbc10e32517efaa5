"""Computing the rows of a batch from its step, so that a run resumes at any step without replaying earlier ones."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy

from mbridge_train.data.errors import DataError


@dataclass(frozen=True, kw_only=True, slots=True)
class RowOrder:
    """An order in which every epoch has each row once. The order of an epoch depends only on `(seed, epoch)`.

    A batch that reaches the end of an epoch continues with the next one, so that only the last batch can be smaller.

    Attributes:
        size: number of rows of the data.
        batch_size: number of rows of a batch.
        seed: None keeps the rows in the order of the data.
        epochs: number of passes over the rows; None: no end.

    Raises:
        ValueError: `size` or `batch_size` is less than 1.
    """

    size: int
    batch_size: int
    seed: int | None
    epochs: int | None = None

    def __post_init__(self) -> None:
        if self.size < 1 or self.batch_size < 1:
            raise ValueError(f"{self.size} rows in batches of {self.batch_size}: both must be at least 1")

    def rows(self, step: int) -> list[int]:
        """Return the indices of the rows of batch `step`, which counts from 0; none after the last epoch."""
        first, end = step * self.batch_size, (step + 1) * self.batch_size
        if self.epochs is not None:
            end = min(end, self.epochs * self.size)
        places = [divmod(ordinal, self.size) for ordinal in range(first, end)]
        if self.seed is None:
            return [position for _, position in places]
        return [int(_permutation(self.size, self.seed, epoch)[position]) for epoch, position in places]


@lru_cache(maxsize=2)
def _permutation(size: int, seed: int, epoch: int) -> "numpy.typing.NDArray[numpy.int64]":
    return numpy.random.default_rng([seed, epoch]).permutation(size)


def require_same_data(saved: Mapping[str, Any], current: Mapping[str, Any]) -> None:
    """Check that a resumed run continues with the rows and the order that it started with.

    Args:
        saved: the checkpoint's values that decide which rows a step has: keys of the config, a fingerprint, `rows`.
        current: the same values of this run. A name that an older checkpoint does not have is not compared.

    Raises:
        DataError: a value of `current` differs.
    """
    for name, value in current.items():
        if name in saved and saved[name] != value:
            what = "the number of rows to train on" if name == "rows" else name
            raise DataError(
                f"cannot continue with other data: {what} was {saved[name]} when the checkpoint was saved and is "
                f"{value} now; use the data and settings of the first run, or start a new run from its HuggingFace copy"
            )
