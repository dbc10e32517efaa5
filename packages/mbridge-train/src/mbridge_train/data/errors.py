"""What can be wrong with data: each message says what, where (file and row), and what to change."""

from mbridge_train.errors import TrainError


class DataError(TrainError):
    """Data cannot be read, found, made or used."""


class RowError(DataError):
    """One row cannot be used: the loader skips up to `data.max_bad_rows` of them."""


class LongRowError(RowError):
    """One row has more tokens than a sequence may have."""
