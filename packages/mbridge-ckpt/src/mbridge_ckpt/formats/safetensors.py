"""Read safetensors files that are not trusted: the header and its checks, the index of a sharded model, the tensors.

The format (huggingface/safetensors): 8 bytes little-endian header length, that many bytes of JSON, then the data.
"""

from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mbridge_ckpt.errors import CorruptCheckpointError, UnsafeCheckpointError, naming
from mbridge_ckpt.files.json_text import parse_json
from mbridge_ckpt.files.paths import relative_path
from mbridge_ckpt.formats.tensors import DTYPE_BYTES, SAFETENSORS_CODES, TensorRecord, read_into

if TYPE_CHECKING:
    from torch import Tensor

MAXIMUM_HEADER_BYTES = 100_000_000
_DTYPES = {code: dtype for dtype, code in SAFETENSORS_CODES.items()}


def read_safetensors_header(path: Path) -> tuple[TensorRecord, ...]:
    """Return the tensors of a safetensors file, in the order of their data.

    Raises CorruptCheckpointError, or UnsafeCheckpointError for ranges that overlap or reach beyond the file and for a
    header longer than the file; the message names `path` and the tensor.
    """
    with naming(path), path.open("rb") as stream:
        size = stream.seek(0, 2)
        stream.seek(0)
        length = int.from_bytes(stream.read(8), "little")
        if size < 8:
            raise CorruptCheckpointError(f"{size} bytes, too short for a safetensors file")
        if length > min(size - 8, MAXIMUM_HEADER_BYTES):
            raise UnsafeCheckpointError(f"its header claims {length} bytes in a file of {size}")
        return _tensors(_object(stream.read(length)), size - 8 - length)


def read_safetensors(path: Path) -> "Iterator[tuple[str, Tensor]]":
    """Yield (name, CPU tensor) in the order of the data, with the memory of one; raises as `read_safetensors_header`.

    The safetensors library maps the file, so that everything read from it counts as memory of the process.
    """
    import torch

    records = read_safetensors_header(path)
    with path.open("rb", buffering=0) as stream:
        stream.seek(8 + int.from_bytes(stream.read(8), "little"))
        for record in records:
            tensor = torch.empty(record.shape, dtype=getattr(torch, record.dtype))
            read_into(tensor, stream, path)
            yield record.name, tensor
            del tensor  # before the next one is made


def read_safetensors_index(path: Path) -> dict[str, str]:
    """Return the `weight_map` of a `*.safetensors.index.json`: tensor names to file names of shards beside the index.

    Raises CorruptCheckpointError, or UnsafeCheckpointError for a shard that is absolute or outside the directory.
    """
    with naming(path):
        weight_map = _object(path.read_bytes()).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
            raise CorruptCheckpointError("no weight_map of names to file names")
        for name, shard in weight_map.items():
            try:
                relative_path(shard)
            except ValueError as error:
                raise UnsafeCheckpointError(f"weight_map of {name!r}: {error}; shards lie beside the index") from None
        return weight_map


def _object(data: bytes) -> dict[str, Any]:
    value = parse_json(data)
    if not isinstance(value, dict):
        raise CorruptCheckpointError(f"its header is a JSON {type(value).__name__}, not an object")
    return value


def _tensors(header: Mapping[str, Any], data_bytes: int) -> tuple[TensorRecord, ...]:
    ranges = []
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        match entry:
            case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [int(begin), int(end)]} if (
                dtype in _DTYPES
                and all(type(extent) is int and extent >= 0 for extent in shape)
                and type(begin) is int
                and type(end) is int
            ):
                width = DTYPE_BYTES[_DTYPES[dtype]]
            case _:
                raise CorruptCheckpointError(f"tensor {name!r}: malformed entry {str(entry)[:200]}")
        if not 0 <= begin <= end <= data_bytes:
            raise UnsafeCheckpointError(f"tensor {name!r}: bytes {begin} to {end} reach beyond the data ({data_bytes})")
        if end - begin != prod(shape) * width:
            raise CorruptCheckpointError(f"tensor {name!r}: shape {shape} of {dtype} does not fit {end - begin} bytes")
        ranges.append((begin, end, TensorRecord(name, tuple(shape), _DTYPES[dtype])))
    ranges.sort(key=lambda item: (item[0], item[1]))
    position = 0
    for begin, end, tensor in ranges:
        if begin < position:
            raise UnsafeCheckpointError(f"tensor {tensor.name!r}: its bytes overlap those of another tensor")
        if begin > position:
            raise CorruptCheckpointError(
                f"tensor {tensor.name!r}: {begin - position} bytes before it belong to no tensor"
            )
        position = end
    if position != data_bytes:
        raise CorruptCheckpointError(f"{data_bytes - position} bytes at the end belong to no tensor")
    return tuple(tensor for _, _, tensor in ranges)
