"""A tensor in a file: its name, shape and dtype, and how its bytes become a tensor in memory."""

from dataclasses import dataclass
from io import RawIOBase
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mbridge_ckpt.errors import CorruptCheckpointError

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class TensorRecord:
    """A tensor in a file: the keys that lead to it joined by "/", its shape and dtype ("float32")."""

    name: str
    shape: tuple[int, ...]
    dtype: str


DTYPE_BYTES = {
    "float64": 8, "float32": 4, "float16": 2, "bfloat16": 2, "int64": 8, "int32": 4, "int16": 2, "int8": 1,
    "uint64": 8, "uint32": 4, "uint16": 2, "uint8": 1, "bool": 1, "float8_e4m3fn": 1, "float8_e5m2": 1,
    "float8_e4m3fnuz": 1, "float8_e5m2fnuz": 1, "float8_e8m0fnu": 1,
}  # fmt: skip
"""Bytes of an element, by torch's name of the dtype."""

SAFETENSORS_CODES = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "int64": "I64", "int32": "I32",
    "int16": "I16", "int8": "I8", "uint64": "U64", "uint32": "U32", "uint16": "U16", "uint8": "U8", "bool": "BOOL",
    "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2", "float8_e8m0fnu": "F8_E8M0",
}  # fmt: skip
"""safetensors' names of the dtypes that it has."""

TORCH_STORAGES = {
    "float64": "DoubleStorage", "float32": "FloatStorage", "float16": "HalfStorage", "bfloat16": "BFloat16Storage",
    "int64": "LongStorage", "int32": "IntStorage", "int16": "ShortStorage", "int8": "CharStorage",
    "uint8": "ByteStorage", "bool": "BoolStorage",
}  # fmt: skip
"""torch's storage classes of the dtypes that have one; the others are stored untyped beside their dtype."""


def dtype_name(tensor: Any) -> str:
    """Return torch's name of the dtype, "float32"."""
    return str(tensor.dtype).removeprefix("torch.")


def tensor_bytes(tensor: "Tensor") -> memoryview:
    """Return the bytes of a contiguous CPU tensor, in its own memory."""
    import torch

    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy()) if tensor.numel() else memoryview(b"")


def read_into(tensor: "Tensor", stream: RawIOBase, path: Path) -> None:
    """Fill a contiguous CPU tensor from an open file; raise CorruptCheckpointError naming `path` if that ends early."""
    rest = tensor_bytes(tensor)
    while len(rest):
        count = stream.readinto(rest)
        if not count:
            raise CorruptCheckpointError(f"{path}: ends within a tensor")
        rest = rest[count:]
