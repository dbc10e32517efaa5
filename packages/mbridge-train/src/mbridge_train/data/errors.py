"""Errors of data. Each message says what is wrong, where (file and row), and what to change."""

from pathlib import Path

from mbridge_train.errors import TrainError


class DataError(TrainError):
    """Data cannot be found, read, made or used."""


class RowError(DataError):
    """One row cannot be used. The loader leaves out up to `data.max_bad_rows` of them."""


class LongRowError(RowError):
    """One row has more tokens than a sequence may hold."""


def missing_file(path: Path) -> DataError:
    """Return the error for a data file or directory that does not exist."""
    return DataError(f"{path} does not exist (from {Path.cwd()}): correct data.train_data_paths or data.val_data_paths")
