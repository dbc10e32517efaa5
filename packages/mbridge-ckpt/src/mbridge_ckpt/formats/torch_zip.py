"""Write a torch.save file tensor by tensor, in one pass, with no more memory than one tensor.

torch.save needs all tensors in memory, and those of a GPU on the host with their whole storages. This module writes the
same format (a zip of stored entries: data.pkl, then the bytes of each storage, 64-byte aligned so that they can be
mapped) but reads each tensor only when it is written. torch.load reads the file with `weights_only=True`.
"""

import io
import pickle
import struct
import sys
import zlib
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any, Protocol

from mbridge_ckpt.errors import CheckpointError
from mbridge_ckpt.formats.tensors import DTYPE_BYTES, TORCH_STORAGES, TensorRecord, dtype_name, tensor_bytes
from mbridge_ckpt.formats.torch_reader import MAXIMUM_DEPTH

if TYPE_CHECKING:
    from torch import Tensor

ALIGNMENT = 64
WIDE_FROM = 0xFFFFFFFF  # sizes and offsets from here on need the 64-bit fields
_FULL_32 = 0xFFFFFFFF
_FULL_16 = 0xFFFF


@dataclass(frozen=True, slots=True, eq=False)
class LazyTensor:
    """A tensor made only when it is written: `read()` must return this shape and dtype ("float32"), on any device."""

    shape: tuple[int, ...]
    dtype: str
    read: "Callable[[], Tensor]"

    def counted(self, progress: Callable[[int], None] | None) -> "LazyTensor":
        """Return the same tensor, whose bytes are reported to `progress` when it has been read."""
        if progress is None:
            return self

        def read() -> "Tensor":
            value = self.read()
            progress(value.nbytes)
            return value

        return LazyTensor(self.shape, self.dtype, read)


@dataclass(frozen=True, slots=True, eq=False)
class _Storage:
    key: str
    dtype: str
    elements: int


def host_tensor(tensor: "Tensor") -> "Tensor":
    """Return `tensor` detached, contiguous and on the CPU; not a copy if it is all that already."""
    return tensor.detach().cpu().contiguous()


class Writer(Protocol):
    """A binary file, or what hashes on the way to one."""

    def write(self, data: bytes | memoryview, /) -> object: ...


def write_torch_file(
    out: Writer, value: Any, to_host: "Callable[[Tensor], Tensor]" = host_tensor
) -> tuple[TensorRecord, ...]:
    """Write `value` in torch.save's format; returns the tensors in it.

    `value` is made of dict, OrderedDict, list, tuple, str, int, float, bool, None, torch.Size, torch.dtype, tensors and
    LazyTensors. Tensors are stored detached, on the CPU and without the rest of the storage that they are a view of;
    `to_host` copies them to contiguous host memory one at a time. Two tensors that share memory are stored twice.

    Raises CheckpointError naming the key for any other type: it could be written but not read back safely.
    """
    records: list[TensorRecord] = []
    pickled = io.BytesIO()
    pickler = _Pickler(pickled)
    pickler.dump(_plain(value, "", 0, records))
    archive = _Archive(out)
    archive.add("data.pkl", pickled.getvalue())
    archive.add(".format_version", b"1")
    archive.add(".storage_alignment", str(ALIGNMENT).encode())
    archive.add("byteorder", sys.byteorder.encode())
    for key, tensor in enumerate(pickler.tensors):
        archive.add(f"data/{key}", tensor_bytes(to_host(_real(tensor))), has_crc=False)
    archive.add("version", b"3\n")
    archive.finish()
    return tuple(records)


def _plain(value: Any, name: str, depth: int, records: list[TensorRecord]) -> Any:
    """Copy the containers of `value` and record its tensors; raises CheckpointError if it cannot be stored."""
    import torch

    if depth > MAXIMUM_DEPTH:
        raise CheckpointError(f"{name[:80]}: containers nested deeper than {MAXIMUM_DEPTH}, or containing themselves")
    if type(value) in (torch.Tensor, torch.nn.Parameter, LazyTensor):
        dtype = dtype_name(value)
        if dtype not in DTYPE_BYTES or (not isinstance(value, LazyTensor) and value.layout is not torch.strided):
            raise CheckpointError(
                f"{name}: tensors of dtype {dtype}, or sparse ones, cannot be stored; convert it first"
            )
        records.append(TensorRecord(name, tuple(value.shape), dtype))
        return value
    prefix = f"{name}/" if name else ""
    if type(value) in (dict, OrderedDict):
        for key in value:
            if type(key) not in (str, int, bool, float, type(None)):
                raise CheckpointError(f"{name or 'top level'}: key {key!r} is no text or number; use one of these")
        return type(value)((key, _plain(item, f"{prefix}{key}", depth + 1, records)) for key, item in value.items())
    if type(value) in (list, tuple):
        return type(value)(_plain(item, f"{prefix}{i}", depth + 1, records) for i, item in enumerate(value))
    if value is None or type(value) in (str, int, float, bool, torch.Size, torch.dtype):
        return value
    raise CheckpointError(
        f"{name or 'top level'}: a {type(value).__module__}.{type(value).__name__} cannot be stored; a checkpoint holds"
        " plain containers, numbers, text and tensors (turn arrays and bytes into tensors, objects into dicts)"
    )


def _real(tensor: "Tensor | LazyTensor") -> "Tensor":
    if not isinstance(tensor, LazyTensor):
        return tensor
    real = tensor.read()
    if (tuple(real.shape), dtype_name(real)) != (tensor.shape, tensor.dtype):
        raise ValueError(f"announced {tensor.dtype}{list(tensor.shape)}, got {dtype_name(real)}{list(real.shape)}")
    return real


class _Pickler(pickle.Pickler):
    """Pickles each tensor as torch does: as a call that rebuilds it from a storage outside of the pickle."""

    def __init__(self, stream: io.BytesIO) -> None:
        super().__init__(stream, protocol=2)  # the one that weights_only reads
        self.tensors: list[Tensor | LazyTensor] = []

    def persistent_id(self, value: Any) -> Any:
        if not isinstance(value, _Storage):
            return None
        import torch

        if value.dtype in TORCH_STORAGES:
            return "storage", getattr(torch, TORCH_STORAGES[value.dtype]), value.key, "cpu", value.elements
        return "storage", torch.UntypedStorage, value.key, "cpu", value.elements * DTYPE_BYTES[value.dtype]

    def reducer_override(self, value: Any) -> Any:
        import torch

        if not isinstance(value, (torch.Tensor, LazyTensor)):
            return NotImplemented
        dtype, shape = dtype_name(value), tuple(value.shape)
        stride = tuple(prod(shape[dimension + 1 :]) for dimension in range(len(shape)))
        storage = _Storage(str(len(self.tensors)), dtype, prod(shape))
        self.tensors.append(value)
        arguments: tuple[Any, ...] = (storage, 0, shape, stride, False, OrderedDict())
        if dtype in TORCH_STORAGES:
            return torch._utils._rebuild_tensor_v2, arguments
        return torch._utils._rebuild_tensor_v3, (*arguments, getattr(torch, dtype))


class _Archive:
    """A zip archive of stored entries (PKWARE APPNOTE 6.3, with its 64-bit extensions where sizes need them)."""

    def __init__(self, out: Writer) -> None:
        self._out = out
        self._position = 0
        self._directory: list[bytes] = []

    def add(self, name: str, data: bytes | memoryview, *, has_crc: bool = True) -> None:
        """Add an entry, with its CRC-32 so that tools that scan pickles in zips accept it.

        For a storage the CRC would cost more than writing it; the manifest has a checksum.
        """
        size, crc = memoryview(data).nbytes, zlib.crc32(data) if has_crc else 0
        encoded = f"archive/{name}".encode()
        offset = self._position
        large, far = size >= WIDE_FROM, offset >= WIDE_FROM
        extra = struct.pack("<HHQQ", 1, 16, size, size) if large else b""
        padding = -(offset + 30 + len(encoded) + len(extra) + 4) % ALIGNMENT
        extra += struct.pack("<2sH", b"FB", padding) + b"Z" * padding
        sizes = [_FULL_32, _FULL_32] if large else [size, size]
        header = struct.pack("<4s5H3I2H", b"PK\3\4", 45, 0, 0, 0, 0, crc, *sizes, len(encoded), len(extra))
        self._write(header + encoded + extra)
        self._write(data)
        wide = [size, size] * large + [offset] * far
        extra = struct.pack(f"<HH{len(wide)}Q", 1, 8 * len(wide), *wide) if wide else b""
        fields = (45, 45, 0, 0, 0, 0, crc, *sizes, len(encoded), len(extra), 0, 0, 0, 0, _FULL_32 if far else offset)
        self._directory.append(struct.pack("<4s6H3I5H2I", b"PK\1\2", *fields) + encoded + extra)

    def finish(self) -> None:
        """Write the central directory, which readers start from."""
        begin, count = self._position, len(self._directory)
        self._write(b"".join(self._directory))
        size = self._position - begin
        wide = begin + size >= WIDE_FROM or count >= _FULL_16
        if wide:
            end = struct.pack("<4sQ2H2I4Q", b"PK\6\6", 44, 45, 45, 0, 0, count, count, size, begin)
            self._write(end + struct.pack("<4sIQI", b"PK\6\7", 0, begin + size, 1))
        numbers = (_FULL_16, _FULL_16, _FULL_32, _FULL_32) if wide else (count, count, size, begin)
        self._write(struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, *numbers, 0))

    def _write(self, data: bytes | memoryview) -> None:
        self._out.write(data)
        self._position += memoryview(data).nbytes
