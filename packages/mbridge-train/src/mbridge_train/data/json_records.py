"""Reading records of `.jsonl` files (one JSON object per line) and `.json` files (one array of objects)."""

import codecs
import hashlib
import json
import re
import sys
from array import array
from pathlib import Path
from typing import Any

from mbridge_train.data.errors import DataError, RowError, missing_file


class JsonRecords:
    """The objects of a UTF-8 file, in their order, numbered from 0. Blank lines do not count.

    Records of a `.jsonl` file are parsed on demand; a `.json` file is parsed and kept. Can be pickled, to be read in
    other processes.

    Attributes:
        fingerprint: SHA-256 of where each record of a `.jsonl` file begins and of the file's first mebibyte, or of a
            `.json` file.

    Raises:
        DataError: the file has another suffix, cannot be read or holds no records, or a `.json` file is not an array.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offsets, self._lines = array("Q"), array("Q")
        self._parsed: list[Any] | None = None
        if path.suffix not in (".json", ".jsonl"):
            raise DataError(f"{path} is neither .json nor .jsonl: give one of these, named so")
        try:
            if path.suffix == ".json":
                content = path.read_bytes()
                self.fingerprint = hashlib.sha256(content).hexdigest()
                self._parsed = self._parse_array(content)
            else:
                self._find_lines()
        except FileNotFoundError:
            raise missing_file(path) from None
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error.strerror}") from None
        if not len(self):
            raise DataError(f"{path} holds no examples: give a file with at least one record, or take it out")

    def __len__(self) -> int:
        return len(self._offsets if self._parsed is None else self._parsed)

    def source(self, index: int) -> str:
        """Return the record's place: file and line, or file and number of the record, both from 1."""
        return f"{self._path}, record {index + 1}" if self._parsed is not None else f"{self._path}:{self._lines[index]}"

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return record `index`.

        Raises:
            IndexError: there is no such record.
            RowError: it is not JSON, not UTF-8 or not an object.
            DataError: the file can no longer be read.
        """
        record = self._parse_line(index) if self._parsed is None else self._parsed[index]
        if not isinstance(record, dict):
            raise RowError(f"{self.source(index)}: a JSON {json_type(record)}, not an object: write {{…}}")
        return record

    def _find_lines(self) -> None:
        offset = 0
        with self._path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if line.removeprefix(codecs.BOM_UTF8).strip():
                    self._offsets.append(offset)
                    self._lines.append(number)
                offset += len(line)
            file.seek(0)
            self.fingerprint = hashlib.sha256(self._offsets.tobytes() + file.read(2**20)).hexdigest()

    def _parse_line(self, index: int) -> Any:
        try:
            with self._path.open("rb") as file:
                file.seek(self._offsets[index])
                line = file.readline().rstrip(b"\n")
        except OSError as error:
            raise DataError(f"{self._path} cannot be read any more: {error.strerror}") from None
        try:
            return _parse(line)
        except (ValueError, RecursionError) as error:
            start = line.decode(errors="replace").strip()[:60]
            raise RowError(
                f"{_fault(self._path, self._lines[index], line, error)}; each line of a .jsonl file is one JSON "
                f"object: correct or delete the line, which starts {start!r}"
            ) from None

    def _parse_array(self, content: bytes) -> list[Any]:
        try:
            array = _parse(content) if content.strip() else []
        except (ValueError, RecursionError) as error:
            raise DataError(
                f"{_fault(self._path, 1, content, error)}; a .json file holds one array of objects"
            ) from None
        if not isinstance(array, list):
            raise DataError(
                f"{self._path} holds a JSON {json_type(array)}, not an array of objects: write [{{…}}, {{…}}]"
            )
        return array


def json_type(value: Any) -> str:
    """Return JSON's name for the type of a parsed value."""
    names = {dict: "object", list: "array", str: "string", bool: "boolean", type(None): "null"}
    return names.get(type(value), "number")


def _parse(content: bytes) -> Any:
    # Decoded here because json.loads mistakes bytes that begin like UTF-16 for UTF-16.
    return json.loads(content.removeprefix(codecs.BOM_UTF8).decode())


def _fault(path: Path, line: int, content: bytes, error: ValueError | RecursionError) -> str:
    """Describe what is wrong with `content`, which begins at `line` of the file, and in which line."""
    if isinstance(error, json.JSONDecodeError):
        return f"{path}:{line + error.lineno - 1}: not JSON: {error.msg} at column {error.colno}"
    if isinstance(error, UnicodeDecodeError):
        line += content.count(b"\n", 0, error.start)
        return f"{path}:{line}: not UTF-8 text ({error.reason} at byte {error.start}): save the file as UTF-8"
    if isinstance(error, RecursionError):
        return f"{path}:{line}: JSON nested too deep to read"
    most = sys.get_int_max_str_digits()  # Python refuses longer integers, which take quadratic time
    if number := re.search(rb"\d{%d}" % (most + 1), content):
        line += content.count(b"\n", 0, number.start())
    return f"{path}:{line}: a number has more than {most} digits: write it as text, in quotes"
