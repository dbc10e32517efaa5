"""Reading questions with images and choices from parquet files with the columns of the Robo2VLM-1 data set.

The user's turn consists of the images, the question and, if there are any, the choices, one per line. Files are read by
row groups, of which a few small ones are cached: HuggingFace writes 100 rows per group if there are images.
"""

import ast
import hashlib
import json
import re
import reprlib
from bisect import bisect_right
from itertools import accumulate
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from mbridge_train.data.errors import DataError, RowError
from mbridge_train.data.examples import CHOICES, Example, ImageReference, Message, ReadSettings, with_images

KEPT_BYTES = 64 * 2**20
"""Uncompressed bytes of row groups that each process caches per file. A larger group is not cached."""

FINGERPRINT_ROWS = 1024
"""Rows of a file's first row group whose texts its fingerprint covers."""

LONGEST_CHOICES = 100_000
"""Most characters of a list of choices that is written as text."""

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


class QuestionFile:
    """A `.parquet` file of questions; see `Examples`. Without the column of choices, answers are free text.

    Raises `DataError` if the file cannot be read, has no rows, or lacks one of the columns.
    """

    def __init__(self, path: Path, settings: ReadSettings) -> None:
        self._path = path
        self._settings = settings
        try:
            self._file = pq.ParquetFile(path, memory_map=True)
        except (OSError, pa.ArrowException) as error:
            raise DataError(f"{path} cannot be read as parquet: {error}") from None
        self._kept: dict[int, pa.Table] = {}
        names = self._file.schema_arrow.names
        self._image_keys = self._find_images() if settings.image_keys is None else settings.image_keys
        needed = [("prompt_key", settings.prompt_key), ("answer_key", settings.answer_key)]
        for setting, key in [*needed, *(("image_keys", key) for key in self._image_keys)]:
            if key not in names:
                raise DataError(f"{path} has no column {key!r}, only {', '.join(names)}: correct data.{setting}")
        self._texts = [settings.prompt_key, settings.answer_key]
        if settings.choice_key in names:
            self._texts.append(settings.choice_key)
        elif settings.choice_key != CHOICES:
            raise DataError(
                f"{path} has no column {settings.choice_key!r}, only {', '.join(names)}: correct data.choice_key, or "
                f"leave it at {CHOICES!r}, which a file without choices need not have"
            )
        self._columns = [*self._texts, *self._image_keys]
        metadata = self._file.metadata
        # For each row group, the index after that of its last row.
        self._ends = list(accumulate(metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)))
        if not len(self):
            raise DataError(f"{path} has no rows: give a file with at least one, or take it out")

    def _find_images(self) -> tuple[str, ...]:
        schema = self._file.schema_arrow
        found = sorted((name for name in schema.names if re.fullmatch(r"image_?\d*", name)), key=_natural)
        others = [field.name for field in schema if _may_be_image(field.type)]
        if others and not found:  # a name alone must not decide to train a model without its images
            raise DataError(
                f"{self._path} has no column named image, or image and a number, but bytes in {', '.join(others)}: "
                f"set data.image_keys=[{others[0]}], or data.image_keys=[] to use none"
            )
        return tuple(found)

    def __reduce__(self) -> Any:
        return QuestionFile, (self._path, self._settings)

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def source(self, index: int) -> str:
        return f"{self._path} row {index}"

    def fingerprint(self) -> str:
        """Return the SHA-256 of the sizes of the columns in each row group, and of the first rows without images."""
        metadata = self._file.metadata
        groups = [metadata.row_group(group) for group in range(metadata.num_row_groups)]
        chunks = [group.column(column) for group in groups for column in range(group.num_columns)]
        sizes = [(chunk.path_in_schema, chunk.num_values, chunk.total_uncompressed_size) for chunk in chunks]
        try:
            first = next(self._file.iter_batches(batch_size=FINGERPRINT_ROWS, row_groups=[0], columns=self._texts))
        except (OSError, pa.ArrowException) as error:
            raise DataError(f"{self._path} row group 0 cannot be read: {error}") from None
        return hashlib.sha256(repr((sizes, first.to_pylist())).encode()).hexdigest()

    def __getitem__(self, index: int) -> Example:
        source = self.source(index)
        row = self._row(index)
        settings = self._settings
        question = row[settings.prompt_key]
        if not isinstance(question, str) or not question.strip():
            raise RowError(f"{source}: {settings.prompt_key!r} is {reprlib.repr(question)}, not a question")
        images = [
            _image(value, f"{source}, column {key!r}")
            for key in self._image_keys
            for value in (row[key] if isinstance(row[key], list) else [row[key]])
            if value is not None
        ]
        if self._image_keys and not images:
            raise RowError(f"{source}: no image in {', '.join(self._image_keys)}")
        answer = row[settings.answer_key]
        choices = row.get(settings.choice_key)
        texts: tuple[str, ...] | None = None
        if choices is None and not isinstance(answer, str):
            raise RowError(f"{source}: {settings.answer_key!r} is {reprlib.repr(answer)} without choices: write text")
        if choices is not None:
            texts = _choices(choices, f"{source}, column {settings.choice_key!r}")
            right = _right(answer, texts, f"{source}, column {settings.answer_key!r}")
            lines = list(texts)
            if settings.answer_format == "letter":
                lines = [f"{letter}. {text}" for letter, text in zip(LETTERS, texts, strict=False)]
                texts = tuple(LETTERS[: len(texts)])
            question = "\n".join([question, "Choose one:", *lines])
            answer = texts[right]
        if not answer.strip():
            raise RowError(f"{source}: the answer is empty, so the model would learn to say nothing; take the row out")
        listed = iter(images)
        parts = with_images(question, listed, source)
        rest = list(listed)
        if rest and len(rest) < len(images):
            raise RowError(f"{source}: the question has fewer <image> than the row has images; write one for each")
        user = Message(role="user", parts=(*rest, *parts))
        return Example(messages=(user,), answer=answer, choices=texts, source=source)

    def _row(self, index: int) -> dict[str, Any]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        group = bisect_right(self._ends, index)
        index -= self._ends[group - 1] if group else 0
        try:
            if group not in self._kept:
                if self._file.metadata.row_group(group).total_byte_size > KEPT_BYTES:
                    return self._stream(group, index)
                table = self._file.read_row_group(group, columns=self._columns)
                while self._kept and sum(kept.nbytes for kept in self._kept.values()) + table.nbytes > KEPT_BYTES:
                    del self._kept[next(iter(self._kept))]
                self._kept[group] = table
            return dict(self._kept[group].slice(index, 1).to_pylist()[0])
        except (OSError, pa.ArrowException) as error:
            raise RowError(f"{self._path} row group {group} cannot be read: {error}") from None

    def _stream(self, group: int, index: int) -> dict[str, Any]:
        for batch in self._file.iter_batches(
            batch_size=16, row_groups=[group], columns=self._columns, use_threads=False
        ):
            if index < len(batch):
                return dict(batch.slice(index, 1).to_pylist()[0])
            index -= len(batch)
        raise RowError(f"{self._path} row group {group} has fewer rows than its footer says")


def _may_be_image(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return any(field.name == "bytes" for field in kind)
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return _may_be_image(kind.value_type)
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _natural(name: str) -> tuple[int, str]:
    """Return a key that sorts image, image_0, image_2, image_10 in this order."""
    return (int("".join(filter(str.isdigit, name)) or -1), name)


def _image(value: Any, where: str) -> ImageReference:
    if isinstance(value, dict):
        value = value.get("bytes")
    if isinstance(value, bytes) and value:
        return ImageReference(data=value)
    raise RowError(f"{where}: no bytes of an image; save the data set with its images embedded")


def _choices(value: Any, where: str) -> tuple[str, ...]:
    if isinstance(value, str):
        text = value
        if len(text) > LONGEST_CHOICES:
            raise RowError(f"{where}: {len(text)} characters, more than {LONGEST_CHOICES}")
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            try:
                value = ast.literal_eval(text)
            except (ValueError, SyntaxError, MemoryError, RecursionError):
                raise RowError(f"{where}: {text[:60]!r} is no list; write one such as ['Yes', 'No']") from None
    valid = isinstance(value, list | tuple) and all(
        isinstance(item, str | int | float) and not isinstance(item, bool) for item in value
    )
    if not valid or not 2 <= len(value) <= len(LETTERS):
        raise RowError(f"{where}: {str(value)[:60]!r} is no list of 2 to {len(LETTERS)} texts")
    return tuple(map(str, value))


def _right(answer: Any, choices: tuple[str, ...], where: str) -> int:
    """Return the index of the right choice: an integer is the index itself; text is a choice, a letter, or an index."""
    right = -1
    if isinstance(answer, int | float) and not isinstance(answer, bool) and answer == answer // 1:
        right = int(answer)  # pandas turns a column of integers into floats if a row has none
    elif isinstance(answer, str):
        text = answer.strip()
        if text in choices:
            right = choices.index(text)
        elif len(text) == 1 and text.upper() in LETTERS:
            right = LETTERS.index(text.upper())
        elif text.isdecimal():
            right = int(text)
    if not 0 <= right < len(choices):
        raise RowError(
            f"{where}: {reprlib.repr(answer)} is none of the {len(choices)} choices, nor the index or letter of one"
        )
    return right
