"""Unpickle the structure of a torch.save file without torch and without running anything in it.

The unpickler knows a handful of names, all mapped to inert stand-ins, so that the worst outcome of a hostile file is
that it is refused. Tensors become descriptions of where their bytes lie.
"""

import copy
import io
import pickle
import pickletools
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from mbridge_ckpt.errors import CorruptCheckpointError, UnsafeCheckpointError
from mbridge_ckpt.formats.tensors import DTYPE_BYTES, TORCH_STORAGES

_HARMLESS_TUPLE_DEPTH = 20_000  # hashing overflows the stack of a process at some hundred thousand

# By the name of the storage class; dtypes without one are stored as bytes beside the name of the dtype.
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
    """Where a tensor lies: the entry of the archive, and offset and strides within it in elements."""

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


def map_tensors(value: Any, function: Callable[[StoredTensor], Any]) -> Any:
    """Copy the containers of `value` with `function` applied to each StoredTensor."""
    if isinstance(value, StoredTensor):
        return function(value)
    if isinstance(value, dict):
        return {key: map_tensors(item, function) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(map_tensors(item, function) for item in value)
    return value


class Call:
    """A function that a pickle may call, wrapped since the pickle could set attributes of the function itself."""

    __slots__ = ("_function",)

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def __call__(self, *arguments: Any) -> Any:
        return self._function(*arguments)


def _size(extents: Any) -> tuple[int, ...]:
    if not all(type(extent) is int for extent in extents):
        raise CorruptCheckpointError("a torch.Size of something other than integers")
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
    ("torch", "Size"): Call(_size),
    ("torch._utils", "_rebuild_tensor_v2"): Call(_rebuild_tensor_v2),
    ("torch._utils", "_rebuild_tensor_v3"): Call(_rebuild_tensor_v3),
    **{("torch", name): storage for name, storage in _STORAGES.items()},
    ("torch.storage", "UntypedStorage"): _STORAGES["UntypedStorage"],
    **{("torch", name): _Dtype(name) for name in DTYPE_BYTES},
}


StandIns = Mapping[tuple[str, str], Callable[[], Any]]
"""Further names that a pickle may use, by module and name, each with a maker of a fresh inert stand-in."""


def unpickle(data: bytes, storages: dict[str, int], stand_ins: StandIns) -> Any:
    """Return what `data` pickles, with a StoredTensor in place of each tensor.

    `storages` are the sizes in bytes of the storages that it may refer to. Raises CorruptCheckpointError or
    UnsafeCheckpointError, or whatever the unpickler raises at malformed bytes.
    """
    _check_memo(data)
    tuples = sum(map(data.count, (b"\x85", b"\x86", b"\x87"))) + min(data.count(b"("), data.count(b"t"))  # at most
    if tuples > _HARMLESS_TUPLE_DEPTH:
        _check_tuples(data)
    return _Unpickler(data, storages, stand_ins).load()


class _Unpickler(pickle.Unpickler):
    """Builds plain containers and the stand-ins above; refuses any other name."""

    def __init__(self, data: bytes, storages: dict[str, int], others: StandIns) -> None:
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
        # A copy, since a pickle may set attributes of it (BUILD), which must not outlast the pickle.
        return copy.copy(_GLOBALS[module, name])

    def persistent_load(self, identifier: Any) -> _Storage:
        match identifier:
            case ("storage", (str(dtype), int(width)), str(key), str(), int(elements)):
                if key not in self._storages or elements < 0 or elements * width > self._storages[key]:
                    raise CorruptCheckpointError(f"storage {key!r} of {elements} elements is not in the file in full")
                return _Storage(dtype, key, elements)
        raise CorruptCheckpointError(f"malformed storage reference {identifier!r}")


def _check_memo(data: bytes) -> None:
    """Refuse a memo index out of proportion, for which the unpickler would allocate a table of as many slots."""
    for operation, argument, _ in pickletools.genops(data):
        if operation.name in ("LONG_BINPUT", "PUT") and int(argument or 0) > len(data):
            raise UnsafeCheckpointError(
                f"its pickle has memo index {argument} in {len(data)} bytes, which would fill the memory"
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
            if depth > _HARMLESS_TUPLE_DEPTH:
                raise UnsafeCheckpointError("its pickle nests tuples without bound, which would overflow the stack")
            depths[begin:] = [max(depth, 0)] * len(operation.stack_after)
