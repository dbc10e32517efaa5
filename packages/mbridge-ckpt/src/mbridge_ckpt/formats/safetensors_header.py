"""Read and check the header of a safetensors file, and the index of a sharded one, without reading any tensor.

The format (huggingface/safetensors): 8 bytes little-endian header length, that many bytes of JSON, then the data.
"""

import json
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

from mbridge_ckpt.errors import CheckpointError, CorruptCheckpointError, UnsafeCheckpointError
from mbridge_ckpt.store.layout import relative_path
from mbridge_ckpt.store.manifest import TensorRecord

MAXIMUM_HEADER_BYTES = 100_000_000
DTYPES = {
    "F64": ("float64", 8), "F32": ("float32", 4), "F16": ("float16", 2), "BF16": ("bfloat16", 2), "I64": ("int64", 8),
    "I32": ("int32", 4), "I16": ("int16", 2), "I8": ("int8", 1), "U64": ("uint64", 8), "U32": ("uint32", 4),
    "U16": ("uint16", 2), "U8": ("uint8", 1), "BOOL": ("bool", 1), "F8_E4M3": ("float8_e4m3fn", 1),
    "F8_E5M2": ("float8_e5m2", 1), "F8_E8M0": ("float8_e8m0fnu", 1),
}  # fmt: skip


def read_safetensors_header(path: Path) -> tuple[TensorRecord, ...]:
    """Tensors of a safetensors file, in the order of their data.

    Raises CorruptCheckpointError, or UnsafeCheckpointError for ranges that overlap, reach beyond the file or a header
    longer than the file; the message names `path` and the tensor.
    """
    try:
        with path.open("rb") as stream:
            size = stream.seek(0, 2)
            stream.seek(0)
            length = int.from_bytes(stream.read(8), "little")
            if size < 8:
                raise CorruptCheckpointError(f"{size} bytes, too short for a safetensors file")
            if length > min(size - 8, MAXIMUM_HEADER_BYTES):
                raise UnsafeCheckpointError(f"its header claims {length} bytes in a file of {size}")
            return _tensors(_object(stream.read(length)), size - 8 - length)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise CorruptCheckpointError(f"{path}: cannot be read: {error.strerror}") from None
    except CheckpointError as error:
        raise type(error)(f"{path}: {error}") from None


def read_safetensors_index(path: Path) -> dict[str, str]:
    """`weight_map` of a `*.safetensors.index.json`: tensor name to the shard's file name, beside the index.

    Raises CorruptCheckpointError, or UnsafeCheckpointError for a shard that is absolute or outside the directory.
    """
    try:
        weight_map = _object(path.read_bytes()).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
            raise CorruptCheckpointError("no weight_map of names to file names")
        for name, shard in weight_map.items():
            try:
                relative_path(shard)
            except ValueError as error:
                raise UnsafeCheckpointError(f"weight_map of {name!r}: {error}; shards lie beside the index") from None
        return weight_map
    except FileNotFoundError:
        raise
    except OSError as error:
        raise CorruptCheckpointError(f"{path}: cannot be read: {error.strerror}") from None
    except CheckpointError as error:
        raise type(error)(f"{path}: {error}") from None


def _object(data: bytes) -> dict[str, Any]:
    try:
        value = json.loads(data, object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as error:
        raise CorruptCheckpointError(f"its header is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise CorruptCheckpointError(f"its header is a JSON {type(value).__name__}, not an object")
    return value


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        raise ValueError("the same name stands in it twice")
    return value


def _tensors(header: Mapping[str, Any], data_bytes: int) -> tuple[TensorRecord, ...]:
    ranges = []
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        match entry:
            case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [int(begin), int(end)]} if (
                dtype in DTYPES
                and all(type(extent) is int and extent >= 0 for extent in shape)
                and type(begin) is int
                and type(end) is int
            ):
                width = DTYPES[dtype][1]
            case _:
                raise CorruptCheckpointError(f"tensor {name!r}: malformed entry {str(entry)[:200]}")
        if not 0 <= begin <= end <= data_bytes:
            raise UnsafeCheckpointError(f"tensor {name!r}: bytes {begin} to {end} reach beyond the data ({data_bytes})")
        if end - begin != prod(shape) * width:
            raise CorruptCheckpointError(f"tensor {name!r}: shape {shape} of {dtype} does not fit {end - begin} bytes")
        ranges.append((begin, end, TensorRecord(name, tuple(shape), DTYPES[dtype][0])))
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
