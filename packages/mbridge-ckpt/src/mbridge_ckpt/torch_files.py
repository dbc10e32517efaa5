"""Write and read torch.save files: plain containers and tensors only, so that reading never needs to run code."""

import threading
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Protocol, cast

from mbridge_ckpt.errors import CheckpointError, CorruptCheckpointError, UnsafeCheckpointError
from mbridge_ckpt.manifest import TensorRecord
from mbridge_ckpt.torch_inspect import DTYPE_BYTES, MAXIMUM_DEPTH, inspect_torch_file

if TYPE_CHECKING:
    from torch import Tensor

_crc_lock = threading.Lock()


class Writer(Protocol):
    """Where torch.save writes to."""

    def write(self, data: bytes | memoryview, /) -> int: ...

    def flush(self) -> None: ...


def write_torch_file(file: Writer, value: Any) -> tuple[TensorRecord, ...]:
    """torch.save `value` into `file`; returns the tensors in it.

    `value` is made of dict, OrderedDict, list, tuple, str, int, float, bool, None, torch.Size, torch.dtype and
    tensors. Tensors are stored detached, on the CPU and without the rest of a storage they are a view of; those that
    are not already so are copied first, on the host.

    Raises CheckpointError naming the key for any other type: it could be written but not read back safely.
    """
    import torch

    plain = _plain(value, "", 0)
    with _crc_lock:
        # The zip's CRC-32 costs more than the writing; the manifest's checksum covers the same bytes.
        before = torch.serialization.get_crc32_options()
        torch.serialization.set_crc32_options(False)
        try:
            torch.save(plain, cast(IO[bytes], file))
        finally:
            torch.serialization.set_crc32_options(before)
    return tuple(_records(plain, ""))


def load_torch(path: str | Path, *, map_location: Any = "cpu", mmap: bool = False) -> Any:
    """Read a torch.save file that holds only what `write_torch_file` writes.

    The file is inspected before torch opens it, and then opened with `weights_only=True`. `mmap=True` maps tensors
    from the file instead of reading them (memory is paged in as it is touched).

    Raises UnsafeCheckpointError or CorruptCheckpointError, naming the file and what in it was refused.
    """
    import torch

    path = Path(path)
    inspect_torch_file(path)
    try:
        return torch.load(path, map_location=map_location, weights_only=True, mmap=mmap)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise CorruptCheckpointError(f"{path}: cannot be read: {error}") from None
    except Exception as error:
        kind = UnsafeCheckpointError if "weights_only" in str(error).lower() else CorruptCheckpointError
        raise kind(f"{path}: torch refuses it: {str(error).splitlines()[0]}") from error


def _plain(value: Any, name: str, depth: int) -> Any:
    import torch

    if depth > MAXIMUM_DEPTH:
        raise CheckpointError(f"{name[:80]}: containers nested deeper than {MAXIMUM_DEPTH}, or containing themselves")
    if type(value) in (torch.Tensor, torch.nn.Parameter):
        return _host_tensor(value, name)
    if type(value) in (dict, OrderedDict):
        for key in value:
            if type(key) not in (str, int, bool, float, type(None)):
                raise CheckpointError(
                    f"{name or 'top level'}: key {key!r} is a {type(key).__name__}; use a string or number"
                )
        return type(value)(
            (key, _plain(item, f"{name}/{key}" if name else str(key), depth + 1)) for key, item in value.items()
        )
    if type(value) in (list, tuple):
        return type(value)(_plain(item, f"{name}/{i}" if name else str(i), depth + 1) for i, item in enumerate(value))
    if value is None or type(value) in (str, int, float, bool, torch.Size, torch.dtype):
        return value
    raise CheckpointError(
        f"{name or 'top level'}: a {type(value).__module__}.{type(value).__name__} cannot be stored; a checkpoint holds"
        " plain containers, numbers, text and tensors (turn arrays and bytes into tensors, objects into dicts)"
    )


def _host_tensor(tensor: "Tensor", name: str) -> "Tensor":
    import torch

    if (
        tensor.layout is not torch.strided
        or tensor.is_quantized
        or str(tensor.dtype).removeprefix("torch.") not in DTYPE_BYTES
    ):
        raise CheckpointError(
            f"{name}: tensors of layout {tensor.layout} and dtype {tensor.dtype} cannot be stored; densify it"
        )
    tensor = tensor.detach()
    whole = tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    if tensor.device.type == "cpu" and whole:
        return tensor
    # A view would bring its whole storage along: Megatron's parameters are views of one buffer per data type.
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu").copy_(tensor)


def _records(value: Any, name: str) -> Iterator[TensorRecord]:
    import torch

    if isinstance(value, torch.Tensor):
        yield TensorRecord(name, tuple(value.shape), str(value.dtype).removeprefix("torch."))
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _records(item, f"{name}/{key}" if name else str(key))
    elif isinstance(value, (list, tuple)) and not isinstance(value, torch.Size):
        for index, item in enumerate(value):
            yield from _records(item, f"{name}/{index}" if name else str(index))
