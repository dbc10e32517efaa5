"""Look into a torch.save file without torch and without running anything in it.

A `.pt` file is a zip of stored (not compressed) entries: one pickle and one entry of raw bytes for each storage. The
pickle is read here by an unpickler that knows a handful of names, all of them mapped to inert stand-ins, so the
worst a hostile file can do is to be refused. The same reading gives names, shapes and dtypes of the tensors.
"""

import copy
import io
import pickle
import pickletools
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from mbridge_ckpt.errors import CorruptCheckpointError, UnsafeCheckpointError
from mbridge_ckpt.formats.tensors import DTYPE_BYTES, TORCH_STORAGES, TensorRecord

MAXIMUM_PICKLE_BYTES = 256 << 20
MAXIMUM_DEPTH = 64
HARMLESS_TUPLE_DEPTH = 20_000  # hashing tuples overflows the stack of a process at some hundred thousand

# By the name of the storage class; torch stores dtypes that have none as bytes, and names the dtype itself.
_STORAGES = {storage: (dtype, DTYPE_BYTES[dtype]) for dtype, storage in TORCH_STORAGES.items()}
_STORAGES["UntypedStorage"] = ("bytes", 1)


@dataclass(frozen=True, slots=True)
class _Dtype:
    name: str


@dataclass(frozen=True, slots=True)
class _Storage:
    dtype: str
    key: str
    elements: int


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where a tensor lies: the archive's entry, and offset and strides in elements within it."""

    shape: tuple[int, ...]
    dtype: str
    entry: str
    offset: int
    stride: tuple[int, ...]

    @property
    def is_contiguous(self) -> bool:
        expected = 1
        for extent, step in zip(reversed(self.shape), reversed(self.stride), strict=True):
            if extent != 1 and step != expected:
                return False
            expected *= extent
        return True


class _Call:
    """A function that a pickle may call; not the function itself, whose attributes a pickle could set."""

    __slots__ = ("_function",)

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def __call__(self, *arguments: Any) -> Any:
        return self._function(*arguments)


def _size(extents: Any) -> tuple[int, ...]:
    if not all(type(extent) is int for extent in extents):
        raise CorruptCheckpointError("a torch.Size of what are no numbers")
    return tuple(extents)


def _rebuild_tensor_v2(storage: _Storage, offset: int, size: Any, stride: Any, *_: Any) -> StoredTensor:
    return _checked_tensor(storage, offset, size, stride, storage.dtype)


def _rebuild_tensor_v3(
    storage: _Storage, offset: int, size: Any, stride: Any, _grad: Any, _hooks: Any, dtype: _Dtype, *_: Any
) -> StoredTensor:
    return _checked_tensor(storage, offset, size, stride, dtype.name)


def _checked_tensor(storage: _Storage, offset: int, size: Any, stride: Any, dtype: str) -> StoredTensor:
    size, stride = tuple(size), tuple(stride)
    numbers = (offset, *size, *stride)
    if len(size) != len(stride) or not all(type(number) is int and number >= 0 for number in numbers):
        raise CorruptCheckpointError(f"tensor with offset {offset!r}, size {size!r}, stride {stride!r}")
    width = DTYPE_BYTES[dtype] if storage.dtype == "bytes" else 1
    last = offset + sum((extent - 1) * step for extent, step in zip(size, stride, strict=True)) if 0 not in size else -1
    if (last + 1) * width > storage.elements:
        raise CorruptCheckpointError(f"tensor of size {size} reaches beyond its storage of {storage.elements} elements")
    return StoredTensor(size, dtype, storage.key, offset, stride)


_GLOBALS: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("torch", "Size"): _Call(_size),
    ("torch._utils", "_rebuild_tensor_v2"): _Call(_rebuild_tensor_v2),
    ("torch._utils", "_rebuild_tensor_v3"): _Call(_rebuild_tensor_v3),
    **{("torch", name): storage for name, storage in _STORAGES.items()},
    ("torch.storage", "UntypedStorage"): _STORAGES["UntypedStorage"],
    **{("torch", name): _Dtype(name) for name in DTYPE_BYTES},
}


StandIns = Mapping[tuple[str, str], Callable[[], Any]]
"""Further names that a pickle may use, by module and name, each with what makes a fresh inert stand-in for it."""


class _Unpickler(pickle.Unpickler):
    """Builds plain containers and the stand-ins above; any other name ends the reading."""

    def __init__(self, data: bytes, storages: dict[str, int], others: "StandIns") -> None:
        super().__init__(io.BytesIO(data))
        self._storages = storages
        self._others = others

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in self._others:
            return self._others[module, name]()
        if (module, name) not in _GLOBALS:
            raise UnsafeCheckpointError(
                f"its pickle calls {module}.{name}, which a checkpoint never needs; do not load this file"
            )
        # A copy, since a pickle may set attributes of what it is given (BUILD), and that must not outlast it.
        return copy.copy(_GLOBALS[module, name])

    def persistent_load(self, identifier: Any) -> _Storage:
        match identifier:
            case ("storage", (str(dtype), int(width)), str(key), str(), int(elements)):
                if key not in self._storages or elements < 0 or elements * width > self._storages[key]:
                    raise CorruptCheckpointError(f"storage {key!r} of {elements} elements is not in the file in full")
                return _Storage(dtype, key, elements)
        raise CorruptCheckpointError(f"malformed storage reference {identifier!r}")


@dataclass(frozen=True, slots=True)
class Structure:
    """What a torch.save file holds: the value with a StoredTensor in place of each tensor, the list of them, and the
    position in the file of each storage's bytes.
    """

    value: Any
    tensors: tuple[TensorRecord, ...]
    positions: dict[str, int]


def inspect_torch_file(path: Path) -> tuple[TensorRecord, ...]:
    """Tensors in a torch.save file, in the order of the file; reads the directory and the pickle, no tensor bytes.

    Raises CorruptCheckpointError (not such a file, damaged) or UnsafeCheckpointError (would run code, compressed
    entries that expand without bound, entries outside the archive); the message names `path`.
    """
    with path.open("rb") as stream:
        return read_structure(stream, path).tensors


def read_structure(stream: IO[bytes] | io.RawIOBase, path: Path, stand_ins: StandIns | None = None) -> Structure:
    """Structure of an open torch.save file; raises as `inspect_torch_file` does."""
    try:
        return _read(stream, stand_ins or {})
    except (CorruptCheckpointError, UnsafeCheckpointError) as error:
        raise type(error)(f"{path}: {error}") from None
    except OSError as error:
        raise CorruptCheckpointError(f"{path}: cannot be read: {error}") from None
    except Exception as error:  # noqa: BLE001 - a malformed pickle can make the unpickler raise nearly anything
        raise CorruptCheckpointError(f"{path}: damaged pickle: {type(error).__name__}: {error}") from None


def _read(stream: Any, stand_ins: StandIns) -> Structure:
    try:
        entries = zipfile.ZipFile(stream).infolist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError, UnicodeDecodeError) as error:
        raise CorruptCheckpointError(f"not a torch.save file, or cut short: {error}") from None
    file_bytes = stream.seek(0, io.SEEK_END)
    names = [entry.filename for entry in entries]
    if len(set(names)) != len(names):
        raise UnsafeCheckpointError("two entries of the archive have the same name")
    for entry in entries:
        if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size:
            raise UnsafeCheckpointError(
                f"entry {entry.filename} is compressed ({entry.compress_size} to {entry.file_size} bytes), which"
                " torch.save never does; it may expand to fill the memory"
            )
        if entry.filename.startswith("/") or ".." in entry.filename.split("/"):
            raise UnsafeCheckpointError(f"entry {entry.filename!r} lies outside the archive")
    if sum(entry.file_size for entry in entries) > file_bytes:
        raise UnsafeCheckpointError("its entries overlap: together they are larger than the file")
    pickles = [entry for entry in entries if entry.filename.count("/") == 1 and entry.filename.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise CorruptCheckpointError(f"not a torch.save file: {len(pickles)} entries named data.pkl, expected 1")
    if pickles[0].file_size > MAXIMUM_PICKLE_BYTES:
        raise UnsafeCheckpointError(
            f"its pickle is {pickles[0].file_size} bytes; at most {MAXIMUM_PICKLE_BYTES} are read"
        )
    prefix = pickles[0].filename.removesuffix("data.pkl") + "data/"
    storages = {e.filename.removeprefix(prefix): e.file_size for e in entries if e.filename.startswith(prefix)}
    data = _stored_bytes(stream, pickles[0])
    _check_memo(data)
    tuples = sum(map(data.count, (b"\x85", b"\x86", b"\x87"))) + min(data.count(b"("), data.count(b"t"))  # at most
    if tuples > HARMLESS_TUPLE_DEPTH:
        _check_tuples(data)
    value = _Unpickler(data, storages, stand_ins).load()
    positions = {}
    for entry in entries:
        if entry.filename.startswith(prefix):
            positions[entry.filename.removeprefix(prefix)] = _data_offset(stream, entry)
    records: list[TensorRecord] = []
    # Each container costs a byte of pickle or more, unless it is the same one again: lists that hold one another twice
    # are short to write and endless to walk through.
    _flatten(value, "", 0, records, [1000 + len(data)])
    return Structure(value, tuple(records), positions)


def _data_offset(stream: Any, entry: zipfile.ZipInfo) -> int:
    stream.seek(entry.header_offset)
    header = stream.read(30)
    if len(header) < 30 or header[:4] != b"PK\x03\x04":
        raise CorruptCheckpointError(f"entry {entry.filename} has no local header")
    names = int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
    return entry.header_offset + 30 + names


def _stored_bytes(stream: Any, entry: zipfile.ZipInfo) -> bytes:
    # Not ZipFile.read: it insists on the zip's own CRC-32, which torch can be told to leave out.
    stream.seek(_data_offset(stream, entry))
    data = stream.read(entry.file_size)
    if len(data) < entry.file_size:
        raise CorruptCheckpointError(f"entry {entry.filename} is cut short")
    return data


def _check_memo(data: bytes) -> None:
    """Refuse a memo index out of proportion: the unpickler would allocate a table of that many slots."""
    for operation, argument, _ in pickletools.genops(data):
        if operation.name in ("LONG_BINPUT", "PUT") and int(argument or 0) > len(data):
            raise UnsafeCheckpointError(
                f"its pickle has memo index {argument} in {len(data)} bytes, to fill the memory"
            )


def _check_tuples(data: bytes) -> None:
    """Refuse tuples nested so deep that hashing one, as a dict's key, would end the process without an error."""
    depths: list[int] = []  # of the tuples in each item on the unpickler's stack; -1 for a mark
    marks: list[int] = []  # positions of the marks in `depths`: searching for the last one would be quadratic
    memo: dict[int, int] = {}
    for operation, argument, _ in pickletools.genops(data):
        name, taken = operation.name, operation.stack_before
        if name.endswith("PUT") or name == "MEMOIZE":
            memo[len(memo) if argument is None else int(argument)] = depths[-1]
        elif name.endswith("GET"):
            depths.append(memo[int(argument or 0)])
        elif name == "MARK":
            marks.append(len(depths))
            depths.append(-1)
        else:
            begin = len(depths) - len(taken)
            if pickletools.markobject in taken:
                begin = marks.pop() - taken.index(pickletools.markobject)
            depth = max(depths[begin:], default=0) + name.startswith("TUPLE")
            if depth > HARMLESS_TUPLE_DEPTH:
                raise UnsafeCheckpointError("its pickle nests tuples without measure, to overflow the stack")
            depths[begin:] = [max(depth, 0)] * len(operation.stack_after)


def _flatten(value: Any, name: str, depth: int, records: list[TensorRecord], budget: list[int]) -> None:
    budget[0] -= 1
    if depth > MAXIMUM_DEPTH or budget[0] < 0:
        raise UnsafeCheckpointError(f"containers nested deeper than {MAXIMUM_DEPTH} or without end, at {name[:80]}")
    prefix = f"{name}/" if name else ""
    if isinstance(value, StoredTensor):
        records.append(TensorRecord(name, value.shape, value.dtype))
    elif isinstance(value, dict):
        for key, item in value.items():
            if isinstance(item, (StoredTensor, dict, list, tuple)):
                _flatten(item, f"{prefix}{key}", depth + 1, records, budget)
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            if isinstance(item, (StoredTensor, dict, list, tuple)):
                _flatten(item, f"{prefix}{index}", depth + 1, records, budget)
