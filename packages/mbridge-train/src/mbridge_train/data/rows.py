"""Opening files and directories of examples as one sequence of rows, which are read on demand."""

import hashlib
from bisect import bisect_right
from collections.abc import Callable, Sequence
from ipaddress import ip_network
from pathlib import Path
from typing import Any

from torch.utils.data import ConcatDataset

from mbridge_train.data.chat_rows import ChatFile
from mbridge_train.data.errors import DataError, missing_file
from mbridge_train.data.examples import Example, Examples, ReadSettings
from mbridge_train.data.question_rows import QuestionFile


def read_examples(paths: Sequence[str | Path], settings: ReadSettings | None = None) -> Examples:
    """Open `.parquet` files of questions with images and `.jsonl` files of chats, or directories of them.

    The order is that of the paths, of the names in a directory, and of the rows in a file. Only what gives the number
    of rows is read here: the footer of a parquet file, the line ends of a jsonl file. Raises `DataError` if a path does
    not exist, cannot be read or holds no rows, a parquet file lacks a column, or a private network is not one.
    """
    settings = settings or ReadSettings()
    for network in settings.private_networks:
        try:
            ip_network(network)
        except ValueError as error:
            raise DataError(
                f"data.private_networks: {error}; write addresses such as 10.1.2.3, or networks such as 10.0.0.0/8"
            ) from None
    files = [file for path in paths for file in _files(Path(path))]
    if not files:
        raise DataError("no data files are given: set data.train_data_paths and data.val_data_paths")
    return _Concatenation([_OPEN[file.suffix](file, settings) for file in files])


_OPEN: dict[str, Callable[[Path, ReadSettings], Any]] = {".parquet": QuestionFile, ".jsonl": ChatFile}


def _files(path: Path) -> list[Path]:
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix in _OPEN and not file.name.startswith("."))
        if not files:
            raise DataError(f"{path} holds no .parquet and no .jsonl file: name the directory that directly holds them")
        return files
    if not path.exists():
        raise missing_file(path)
    if path.suffix not in _OPEN:
        raise DataError(f"{path} is neither .parquet nor .jsonl: give a file with one of these suffixes")
    return [path]


class _Concatenation(ConcatDataset[Example]):
    """Several files as one."""

    datasets: list[Any]  # `Examples`, which torch's `Dataset` does not describe

    def source(self, index: int) -> str:
        """Return file and row, without reading the row."""
        number = bisect_right(self.cumulative_sizes, index)
        return self.datasets[number].source(index - (self.cumulative_sizes[number - 1] if number else 0))

    def fingerprint(self) -> str:
        """Return the SHA-256 of the files' fingerprints, in their order, whatever the files are named."""
        return hashlib.sha256("".join(file.fingerprint() for file in self.datasets).encode()).hexdigest()
