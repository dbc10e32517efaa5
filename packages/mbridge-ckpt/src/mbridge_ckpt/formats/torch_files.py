"""Write and read torch.save files: plain containers and tensors only, so that reading never needs to run code."""

from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from mbridge_ckpt.errors import CheckpointError, CorruptCheckpointError, UnsafeCheckpointError
from mbridge_ckpt.files.hashing import HashingReader
from mbridge_ckpt.formats.tensors import DTYPE_BYTES, TensorRecord
from mbridge_ckpt.formats.torch_reader import MAXIMUM_DEPTH, read_structure
from mbridge_ckpt.formats.torch_zip import LazyTensor, Writer, host_tensor, write_torch_zip

if TYPE_CHECKING:
    from torch import Tensor


def write_torch_file(
    out: Writer, value: Any, to_host: "Callable[[Tensor], Tensor]" = host_tensor
) -> tuple[TensorRecord, ...]:
    """Write `value` in torch.save's format; returns the tensors in it.

    `value` is made of dict, OrderedDict, list, tuple, str, int, float, bool, None, torch.Size, torch.dtype, tensors and
    LazyTensors. Tensors are stored detached, on the CPU and without the rest of the storage that they are a view of;
    `to_host` copies them to the host one at a time. Two tensors that share memory are stored twice.

    Raises CheckpointError naming the key for any other type: it could be written but not read back safely.
    """
    records: list[TensorRecord] = []
    write_torch_zip(out, _plain(value, "", 0, records), to_host)
    return tuple(records)


def load_torch(path: str | Path, *, map_location: Any = "cpu", mmap: bool = False) -> Any:
    """Read a torch.save file that holds only the types that `write_torch_file` takes.

    The file is inspected before torch opens it, and then opened with `weights_only=True`. `mmap=True` maps tensors
    from the file instead of reading them (memory is paged in as it is touched).

    Raises UnsafeCheckpointError or CorruptCheckpointError, naming the file and what in it was refused.
    """
    path = Path(path)
    with path.open("rb") as stream:
        read_structure(stream, path)
        return _load(path, path if mmap else stream, map_location, mmap)


def load_torch_hashed(path: Path, map_location: Any = "cpu") -> tuple[Any, str]:
    """Read as `load_torch`, and return the XXH3-128 of the file, too, which is read once for both."""
    with HashingReader(path) as stream:
        read_structure(stream, path)
        value = _load(path, stream, map_location, False)
        return value, stream.digest()


def _load(path: Path, source: Path | IO[bytes] | HashingReader, map_location: Any, mmap: bool) -> Any:
    import torch

    if not isinstance(source, Path):
        source.seek(0)
    try:
        return torch.load(source, map_location=map_location, weights_only=True, mmap=mmap)  # type: ignore[arg-type]
    except FileNotFoundError:
        raise
    except OSError as error:
        raise CorruptCheckpointError(f"{path}: cannot be read: {error}") from None
    except Exception as error:
        kind = UnsafeCheckpointError if "weights_only" in str(error).lower() else CorruptCheckpointError
        raise kind(f"{path}: torch refuses it: {str(error).splitlines()[0]}") from error


def _plain(value: Any, name: str, depth: int, records: list[TensorRecord]) -> Any:
    """Copy the containers of `value` and record its tensors; raises CheckpointError if it cannot be stored."""
    import torch

    if depth > MAXIMUM_DEPTH:
        raise CheckpointError(f"{name[:80]}: containers nested deeper than {MAXIMUM_DEPTH}, or containing themselves")
    if type(value) in (torch.Tensor, torch.nn.Parameter, LazyTensor):
        dtype = str(value.dtype).removeprefix("torch.")
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
