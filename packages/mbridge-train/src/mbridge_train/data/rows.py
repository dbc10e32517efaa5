"""Files and directories of examples as one sequence of rows that are read when they are asked for."""

import hashlib
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from ipaddress import ip_network
from itertools import accumulate
from pathlib import Path
from typing import Literal

from mbridge_train.data.chat_rows import ChatFile
from mbridge_train.data.errors import DataError, missing_file
from mbridge_train.data.examples import Example, Examples
from mbridge_train.data.parquet import ParquetFile


@dataclass(frozen=True, kw_only=True, slots=True)
class ReadSettings:
    """How rows become examples.

    Attributes:
        prompt_key, choice_key, answer_key: parquet columns of the question, the choices and the right one.
        image_keys: parquet columns of images, in the order in which the model sees them. None: all columns named
            "image" or "image" and a number, such as image_0; an empty tuple: no images.
        answer_format: what the model is to answer: the "text" of the right choice, or its "letter".
        image_root: directory that image paths of a jsonl file start at, and must stay in; None: that of the file.
        allow_urls: images of a jsonl file may be fetched over http and https, from public addresses.
        private_networks: other addresses that may be fetched from, such as "10.0.0.0/8".
    """

    prompt_key: str = "question"
    choice_key: str = "choices"
    answer_key: str = "correct_answer"
    image_keys: tuple[str, ...] | None = None
    answer_format: Literal["text", "letter"] = "text"
    image_root: Path | None = None
    allow_urls: bool = False
    private_networks: tuple[str, ...] = ()


def read_examples(paths: Sequence[str | Path], settings: ReadSettings | None = None) -> Examples:
    """Open `.parquet` files of questions with images and `.jsonl` files of chats, or directories of them.

    Order is kept: paths as given, files of a directory by name, rows as they lie in them. Only what tells the number
    of rows is read here: the footer of a parquet file, the line ends of a jsonl file.

    Raises:
        DataError: a path does not exist, cannot be read or holds no rows, a parquet file lacks a column, or a private
            network is not one.
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


def _parquet(path: Path, settings: ReadSettings) -> Examples:
    return ParquetFile(
        path,
        prompt_key=settings.prompt_key,
        choice_key=settings.choice_key,
        answer_key=settings.answer_key,
        image_keys=settings.image_keys,
        answer_format=settings.answer_format,
    )


def _chat(path: Path, settings: ReadSettings) -> Examples:
    return ChatFile(
        path,
        image_root=settings.image_root,
        allow_urls=settings.allow_urls,
        private_networks=settings.private_networks,
    )


_OPEN: dict[str, Callable[[Path, ReadSettings], Examples]] = {".parquet": _parquet, ".jsonl": _chat}


def _files(path: Path) -> list[Path]:
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix in _OPEN and not file.name.startswith("."))
        if not files:
            raise DataError(f"{path} holds no .parquet and no .jsonl file: name the directory that has them itself")
        return files
    if not path.exists():
        raise missing_file(path)
    if path.suffix not in _OPEN:
        raise DataError(f"{path} is neither .parquet nor .jsonl: give one of these, named so")
    return [path]


class _Concatenation:
    """Several files as one."""

    def __init__(self, files: list[Examples]) -> None:
        self._files = files
        self._ends = list(accumulate(map(len, files)))

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> Example:
        file, row = self._find(index)
        return file[row]

    def source(self, index: int) -> str:
        """File and row, without reading the row."""
        file, row = self._find(index)
        return file.source(row)

    def fingerprint(self) -> str:
        """Return the SHA-256 of the files' fingerprints, in their order, whatever the files are named."""
        return hashlib.sha256("".join(file.fingerprint() for file in self._files).encode()).hexdigest()

    def _find(self, index: int) -> tuple[Examples, int]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        number = bisect_right(self._ends, index)
        return self._files[number], index - (self._ends[number - 1] if number else 0)
