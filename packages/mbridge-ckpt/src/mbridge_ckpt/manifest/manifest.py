"""manifest.json, the list of a checkpoint's files. A checkpoint is committed if its final name holds a manifest."""

import json
import re
import stat
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mbridge_ckpt.errors import CheckpointError, CorruptCheckpointError, IncompleteCheckpointError
from mbridge_ckpt.files.hashing import hash_bytes
from mbridge_ckpt.files.json_text import parse_document, parse_fields, without_defaults
from mbridge_ckpt.files.paths import relative_path
from mbridge_ckpt.formats.tensors import TensorRecord
from mbridge_ckpt.manifest.layout import HF_DIRECTORY, MANIFEST_FILE, Layout
from mbridge_ckpt.manifest.placement import ParameterPlacement

FORMAT = "mbridge-checkpoint"
FORMAT_VERSION = 1
MAXIMUM_MANIFEST_BYTES = 1 << 30
_DIGEST = re.compile(r"[0-9a-f]{32}")


@dataclass(frozen=True, kw_only=True, slots=True)
class FileRecord:
    """One file: path relative to the checkpoint, size, XXH3-128 in hexadecimal, and its tensors."""

    path: str
    bytes: int
    xxh3_128: str
    tensors: tuple[TensorRecord, ...] = ()
    placements: tuple[ParameterPlacement, ...] = ()

    @property
    def needed_to_resume(self) -> bool:
        """Whether a run cannot resume without it; False for the HuggingFace export, which may be deleted."""
        return not self.path.startswith(HF_DIRECTORY + "/")

    def to_json(self) -> dict[str, Any]:
        value: dict[str, Any] = {"path": self.path, "bytes": self.bytes, "xxh3_128": self.xxh3_128}
        if self.tensors:
            value["tensors"] = [[tensor.name, list(tensor.shape), tensor.dtype] for tensor in self.tensors]
        if self.placements:
            value["placements"] = [without_defaults(placement) for placement in self.placements]
        return value


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """A whole checkpoint. `metadata` is free for the program that saves (metrics, names); `writer` holds versions.

    `created` is the time of the commit in ISO 8601 and UTC; it is later than that of the previous checkpoint.
    """

    step: int
    created: str
    layout: Layout
    writer: dict[str, str]
    files: tuple[FileRecord, ...]
    metadata: dict[str, Any] = field(default_factory=dict)

    @property
    def commit_order(self) -> tuple[str, int]:
        """Key that sorts checkpoints as they were committed: a run that went back has older ones of later steps."""
        return self.created, self.step

    @property
    def total_bytes(self) -> int:
        """Size of all files without the manifest."""
        return sum(record.bytes for record in self.files)

    def file(self, path: str) -> FileRecord:
        """Return the record of `path`; raises IncompleteCheckpointError if the checkpoint was written without it."""
        for record in self.files:
            if record.path == path:
                return record
        raise IncompleteCheckpointError(
            f"{path} is not part of this checkpoint; it holds {len(self.files)} other files"
        )

    def to_bytes(self) -> bytes:
        """Return JSON text that ends with a checksum of itself, so that a flipped bit in the manifest shows too."""
        body = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "step": self.step,
            "created": self.created,
            "layout": self.layout.to_json(),
            "writer": self.writer,
            "metadata": self.metadata,
            "files": [record.to_json() for record in self.files],
        }
        return _dump({**body, "manifest_xxh3_128": hash_bytes(_dump(body))})

    @classmethod
    def from_bytes(cls, data: bytes) -> "Manifest":
        """Parse and check; raises CorruptCheckpointError, and CheckpointError for a later version of the format."""
        value = parse_document(data, FORMAT, FORMAT_VERSION)
        digest = value.pop("manifest_xxh3_128", None)
        # Hashing a re-serialization works because the writer made the text the same way: same keys, order and spacing.
        if digest != hash_bytes(_dump(value)):
            raise CorruptCheckpointError("its checksum does not fit its content; the manifest was damaged or edited")
        return cls(
            step=_typed(value, "step", int),
            created=_typed(value, "created", str),
            layout=parse_fields(Layout, value.get("layout"), "layout"),
            writer=_typed(value, "writer", dict),
            metadata=_typed(value, "metadata", dict),
            files=_files(_typed(value, "files", list)),
        )


def read_manifest(directory: Path) -> Manifest:
    """Read the manifest of a checkpoint directory, and no other file. Errors name the file."""
    path = directory / MANIFEST_FILE
    try:
        if path.is_symlink():
            raise CorruptCheckpointError("it is a symlink; a manifest is a regular file")
        if not stat.S_ISREG(path.stat().st_mode):
            raise CorruptCheckpointError("it is no regular file")
        if path.stat().st_size > MAXIMUM_MANIFEST_BYTES:
            raise CorruptCheckpointError(f"larger than {MAXIMUM_MANIFEST_BYTES} bytes")
        return Manifest.from_bytes(path.read_bytes())
    except FileNotFoundError:
        raise IncompleteCheckpointError(
            f"{directory} has no {MANIFEST_FILE}: its save never finished, or it is no checkpoint of this program"
        ) from None
    except OSError as error:
        raise IncompleteCheckpointError(f"{path}: cannot be read: {error}") from None
    except CheckpointError as error:
        raise type(error)(f"{path}: {error}") from None


def _files(values: list[Any]) -> tuple[FileRecord, ...]:
    records = tuple(_file(value) for value in values)
    paths = [record.path for record in records]
    if len(set(paths)) != len(paths):
        raise CorruptCheckpointError("files: a path is listed twice")
    return records


def _file(value: Any) -> FileRecord:
    if not isinstance(value, dict):
        raise CorruptCheckpointError("files: expected objects")
    path, size, digest = _typed(value, "path", str), _typed(value, "bytes", int), _typed(value, "xxh3_128", str)
    try:
        relative_path(path)
    except ValueError as error:
        raise CorruptCheckpointError(f"files: {error}") from None
    if size < 0 or not _DIGEST.fullmatch(digest):
        raise CorruptCheckpointError(f"files: {path}: bytes {size} or checksum {digest!r} is malformed")
    value = {"tensors": [], "placements": [], **value}
    return FileRecord(
        path=path,
        bytes=size,
        xxh3_128=digest,
        tensors=tuple(_tensor(path, item) for item in _typed(value, "tensors", list)),
        placements=tuple(
            parse_fields(ParameterPlacement, item, "placement of") for item in _typed(value, "placements", list)
        ),
    )


def _tensor(path: str, value: Any) -> TensorRecord:
    match value:
        case [str(name), list(shape), str(dtype)] if all(type(size) is int and size >= 0 for size in shape):
            return TensorRecord(name, tuple(shape), dtype)
    raise CorruptCheckpointError(f"files: {path}: malformed tensor record {value!r}")


def _typed[T](value: dict[str, Any], key: str, kind: type[T]) -> T:
    found = value.get(key)
    if type(found) is not kind:
        raise CorruptCheckpointError(f"{key}: expected {kind.__name__}, found {type(found).__name__}")
    return found


def _dump(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=True, allow_nan=False).encode()
