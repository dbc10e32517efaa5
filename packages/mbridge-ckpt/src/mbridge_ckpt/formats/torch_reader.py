"""Read torch.save files that are not trusted: as a whole, their structure, or single tensors or rows of them.

A `.pt` file is a zip of stored (not compressed) entries: one pickle, and the raw bytes of each storage. Reading a
tensor needs no more memory than the tensor.
"""

import io
import zipfile
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Self

from mbridge_ckpt.errors import CheckpointError, CorruptCheckpointError, UnsafeCheckpointError, naming
from mbridge_ckpt.files.hashing import HashingReader
from mbridge_ckpt.formats.tensors import DTYPE_BYTES, TensorRecord, read_into
from mbridge_ckpt.formats.torch_pickle import StandIns, StoredTensor, unpickle

if TYPE_CHECKING:
    from torch import Tensor

MAXIMUM_PICKLE_BYTES = 256 << 20
MAXIMUM_DEPTH = 64

Structure = tuple[Any, tuple[TensorRecord, ...], dict[str, int]]
"""The value with a StoredTensor in place of each tensor, the tensors, and where the bytes of each storage begin."""


def inspect_torch_file(path: Path) -> tuple[TensorRecord, ...]:
    """List the tensors in a torch.save file in the order of the file, without reading their bytes.

    Raises CorruptCheckpointError (not such a file, or damaged) or UnsafeCheckpointError (would run code, has compressed
    entries that may expand without bound, or entries outside the archive); the message names `path`.
    """
    with TorchFileReader(path) as reader:
        return reader.tensors


class TorchFileReader:
    """An open torch.save file. `value` is what was saved, with a StoredTensor in place of each tensor of `tensors`.

    Nothing in the file is run; raises as `inspect_torch_file`. `stand_ins` are further names that its pickle may use.
    """

    def __init__(self, path: Path, stand_ins: StandIns | None = None) -> None:
        self.path = path
        self._stream = path.open("rb", buffering=0)
        try:
            self.value, self.tensors, self._positions = _read_structure(self._stream, path, stand_ins)
        except BaseException:
            self._stream.close()
            raise

    def read(self, tensor: StoredTensor, rows: tuple[int, int] | None = None) -> "Tensor":
        """Read a tensor into fresh CPU memory; `rows` are begin and end along dimension 0, by default all."""
        import torch

        dtype = getattr(torch, tensor.dtype)
        width = DTYPE_BYTES[tensor.dtype]
        if not tensor.is_contiguous:
            span = 1 + sum((extent - 1) * step for extent, step in zip(tensor.shape, tensor.stride, strict=True))
            flat = torch.empty(span if 0 not in tensor.shape else 0, dtype=dtype)
            self._fill(flat, tensor.entry, tensor.offset * width)
            whole = flat.as_strided(tensor.shape, tensor.stride).contiguous()
            return whole if rows is None else whole[rows[0] : rows[1]]
        shape, start = tensor.shape, tensor.offset
        if rows is not None:
            shape = (rows[1] - rows[0], *tensor.shape[1:])
            start += rows[0] * (tensor.stride[0] if tensor.shape[0] > 1 else 0)
        result = torch.empty(shape, dtype=dtype)
        self._fill(result, tensor.entry, start * width)
        return result

    def _fill(self, tensor: "Tensor", entry: str, offset: int) -> None:
        self._stream.seek(self._positions[entry] + offset)
        read_into(tensor, self._stream, self.path)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stream.close()


def load_torch(path: str | Path, *, map_location: Any = "cpu", mmap: bool = False) -> Any:
    """Read a torch.save file that holds only plain containers, numbers, text and tensors.

    The file is inspected before torch opens it, and then opened with `weights_only=True`. `mmap=True` maps tensors
    from the file instead of reading them (memory is paged in as it is touched).

    Raises UnsafeCheckpointError or CorruptCheckpointError, naming the file and what in it was refused.
    """
    path = Path(path)
    with path.open("rb") as stream:
        _read_structure(stream, path)
        return _load(path, path if mmap else stream, map_location, mmap)


def load_torch_hashed(path: Path, map_location: Any = "cpu") -> tuple[Any, str]:
    """Read as `load_torch`, and return the XXH3-128 of the file, too, which is read once for both."""
    with HashingReader(path) as stream:
        _read_structure(stream, path)
        value = _load(path, stream, map_location, False)
        return value, stream.digest()


def _load(path: Path, source: Path | IO[bytes] | HashingReader, map_location: Any, mmap: bool) -> Any:
    import torch

    if not isinstance(source, Path):
        source.seek(0)
    with naming(path):
        try:
            return torch.load(source, map_location=map_location, weights_only=True, mmap=mmap)
        except OSError:
            raise
        except Exception as error:
            kind = UnsafeCheckpointError if "weights_only" in str(error).lower() else CorruptCheckpointError
            raise kind(f"torch refuses it: {str(error).splitlines()[0]}") from error


def _read_structure(stream: IO[bytes] | io.RawIOBase, path: Path, stand_ins: StandIns | None = None) -> Structure:
    """Read the structure of an open torch.save file; raises as `inspect_torch_file`."""
    with naming(path):
        try:
            return _read(stream, stand_ins or {})
        except (CheckpointError, OSError):
            raise
        except Exception as error:  # noqa: BLE001 - a malformed pickle can make the unpickler raise nearly anything
            raise CorruptCheckpointError(f"damaged pickle: {type(error).__name__}: {error}") from None


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
    storages = {e.filename.removeprefix(prefix): e for e in entries if e.filename.startswith(prefix)}
    data = _stored_bytes(stream, pickles[0])
    value = unpickle(data, {key: entry.file_size for key, entry in storages.items()}, stand_ins)
    positions = {key: _data_offset(stream, entry) for key, entry in storages.items()}
    records: list[TensorRecord] = []
    # Each container costs a byte of pickle or more, unless it is the same one again: lists that hold one another twice
    # are short to write and endless to walk through.
    _flatten(value, "", 0, records, [1000 + len(data)])
    return value, tuple(records), positions


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


def _flatten(value: Any, name: str, depth: int, records: list[TensorRecord], budget: list[int]) -> None:
    budget[0] -= 1
    if depth > MAXIMUM_DEPTH or budget[0] < 0:
        raise UnsafeCheckpointError(f"containers nested deeper than {MAXIMUM_DEPTH} or without end, at {name[:80]}")
    prefix = f"{name}/" if name else ""
    if isinstance(value, StoredTensor):
        records.append(TensorRecord(name, value.shape, value.dtype))
    elif isinstance(value, (dict, list, tuple)):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            if isinstance(item, (StoredTensor, dict, list, tuple)):
                _flatten(item, f"{prefix}{key}", depth + 1, records, budget)
