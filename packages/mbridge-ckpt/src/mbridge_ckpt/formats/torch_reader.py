"""Read single tensors, or rows of them, out of a torch.save file, with no more memory than what is asked for."""

from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

from mbridge_ckpt.errors import CorruptCheckpointError
from mbridge_ckpt.formats.tensors import DTYPE_BYTES
from mbridge_ckpt.formats.torch_inspect import StandIns, StoredTensor, read_structure

if TYPE_CHECKING:
    from torch import Tensor


class TorchFileReader:
    """An open torch.save file. `value` is what was saved, with a StoredTensor in place of each tensor.

    Runs nothing in the file; raises as `inspect_torch_file` does. `stand_ins` are further names its pickle may use.
    """

    def __init__(self, path: Path, stand_ins: StandIns | None = None) -> None:
        self.path = path
        self._stream = path.open("rb", buffering=0)
        try:
            structure = read_structure(self._stream, path, stand_ins)
        except BaseException:
            self._stream.close()
            raise
        self.value, self._positions = structure.value, structure.positions

    def read(self, tensor: StoredTensor, rows: tuple[int, int] | None = None) -> "Tensor":
        """A fresh CPU tensor; `rows` are begin and end along dimension 0, all by default."""
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
        import torch

        if not tensor.numel():
            return
        self._stream.seek(self._positions[entry] + offset)
        rest = memoryview(tensor.reshape(-1).view(torch.uint8).numpy())
        while len(rest):
            count = self._stream.readinto(rest)
            if not count:
                raise CorruptCheckpointError(f"{self.path}: ends within a tensor")
            rest = rest[count:]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stream.close()
