"""A stream of weights in flat buckets of a fixed size, in memory that another process can map.

    targets = Targets(model.state_dict())
    memory = [shared.data for shared in make_bucket_memory(bucket_bytes, engine.device)]
    for bucket in fill_buckets(engine.export_weights(), memory):
        targets.load(bucket.pieces, Elements(memory[bucket.slot]))
    names = targets.complete()

Here both sides are one process; `weight_stream` does it with two. Two buckets take turns: the next is filled while the
last is being read. A tensor that does not fit into what is left of a bucket goes on in the next, so a bucket may be
smaller than the largest tensor. No Megatron here, so that the receiver needs none.
"""

import mmap
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from multiprocessing.reduction import DupFd
from typing import Any, NamedTuple

import torch
import torch.multiprocessing  # with it, a GPU's tensors go through a connection, as CUDA IPC handles
from torch import Tensor

from mbridge_train.errors import TrainError
from mbridge_train.memory.copying import copy_tensors

BUCKETS = 2
ALIGNMENT = 64  # bytes; a multiple of every dtype's size


class Piece(NamedTuple):
    """A contiguous tensor, or a part of one, in some memory: a bucket's, or a parameter's own.

    A tuple, because hundreds of them go through the connection with each stream.

    Attributes:
        name: of the tensor, HuggingFace's.
        shape, dtype: of the whole tensor.
        start, size: its first element and how many, in row-major order.
        offset: of the first of them in the memory, in bytes; a multiple of the dtype's size.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    start: int
    size: int
    offset: int


class Elements:
    """Memory, uint8 [bytes], as elements of any dtype."""

    def __init__(self, data: Tensor) -> None:
        self._data = data
        self._typed: dict[torch.dtype, Tensor] = {}

    @property
    def device(self) -> torch.device:
        return self._data.device

    def of(self, piece: Piece) -> Tensor:
        """[size], a view."""
        itemsize = piece.dtype.itemsize
        typed = self._typed.get(piece.dtype)
        if typed is None:
            whole = len(self._data) // itemsize * itemsize
            typed = self._typed[piece.dtype] = self._data[:whole].view(piece.dtype)
        first = piece.offset // itemsize
        return typed.narrow(0, first, piece.size)


@dataclass(frozen=True, kw_only=True, slots=True)
class Bucket:
    """Some pieces; `slot` says in which of the buckets."""

    slot: int
    pieces: list[Piece]


class SharedMemory:
    """Memory that goes through a `multiprocessing` connection without being copied; `data` is it, uint8 [bytes].

    On a GPU its maker must keep it until the other process has dropped it. On a CPU it is a memfd, not a file in
    /dev/shm, which containers limit to 64 MB.

    Raises:
        TrainError: there is not so much memory.
    """

    def __init__(self, size: int, device: torch.device) -> None:
        self._descriptor: int | None = None
        if device.type != "cpu":
            self.data = torch.empty(size, dtype=torch.uint8, device=device)
            return
        descriptor = os.memfd_create("mbridge-weights")
        try:
            os.posix_fallocate(descriptor, 0, size)
        except OSError as error:
            os.close(descriptor)
            raise TrainError(f"no {size} bytes of host memory: {error.strerror}; use smaller buckets") from None
        self._descriptor = descriptor
        self.data = _map(descriptor, size)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        if self._descriptor is None:
            return _received, (self.data,)
        return _received_descriptor, (DupFd(self._descriptor), len(self.data))

    def __del__(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)  # the mapping stays while `data` is in use


def _received(data: Tensor) -> SharedMemory:
    memory = SharedMemory.__new__(SharedMemory)
    memory._descriptor, memory.data = None, data
    return memory


def _received_descriptor(duplicate: Any, size: int) -> SharedMemory:
    descriptor = duplicate.detach()
    try:
        return _received(_map(descriptor, size))
    finally:
        os.close(descriptor)


def _map(descriptor: int, size: int) -> Tensor:
    return torch.frombuffer(mmap.mmap(descriptor, size), dtype=torch.uint8)


def make_bucket_memory(bucket_bytes: int, device: torch.device) -> list[SharedMemory]:
    """Memory of `bucket_bytes` for each of `BUCKETS` buckets.

    Raises:
        TrainError: a bucket would be too small to hold an element, or there is not so much memory.
    """
    if bucket_bytes < ALIGNMENT:
        raise TrainError(f"bucket_bytes is {bucket_bytes}: set it to {ALIGNMENT} or more, best to some hundred MB")
    return [SharedMemory(bucket_bytes, device) for _ in range(BUCKETS)]


def fill_buckets(weights: Iterable[tuple[str, Tensor]], memory: list[Tensor]) -> Iterator[Bucket]:
    """Pack a stream of (name, tensor) into buckets; their memory is `memory`, in turns.

    Whoever takes a bucket has finished with the one before it when it asks for the next, which has its memory. On a
    GPU the copies are issued on the current stream.
    """
    slot, offset = 0, 0
    pieces: list[Piece] = []
    elements = [Elements(data) for data in memory]
    for name, tensor in weights:
        flat = tensor.detach().reshape(-1)
        start = 0
        while start < len(flat):
            data = memory[slot]
            count = min(len(flat) - start, (len(data) - offset) // tensor.dtype.itemsize)
            if count > 0:
                piece = Piece(name, tuple(tensor.shape), tensor.dtype, start, count, offset)
                elements[slot].of(piece).copy_(flat[start : start + count])
                pieces.append(piece)
                start += count
                offset = -(-(offset + count * tensor.dtype.itemsize) // ALIGNMENT) * ALIGNMENT
            if start < len(flat):  # the bucket is full
                yield Bucket(slot=slot, pieces=pieces)
                slot, offset, pieces = (slot + 1) % len(memory), 0, []
    if pieces:
        yield Bucket(slot=slot, pieces=pieces)


class Targets:
    """Tensors that pieces are copied into, cast to their dtypes.

    Args:
        tensors: contiguous ones by name, such as a `state_dict()`.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors
        # All at once, which a receiver does while the sender begins.
        self._flat = {name: tensor.detach().view(-1) for name, tensor in tensors.items() if tensor.is_contiguous()}
        self._elements: dict[str, int] = {}

    def load(self, pieces: Iterable[Piece], elements: Elements) -> None:
        """Copy pieces out of their memory.

        Raises:
            TrainError: there is no such tensor, or it has another shape.
        """
        copy_tensors((self._place(piece), elements.of(piece)) for piece in pieces)

    def complete(self) -> set[str]:
        """The names of the tensors that have come.

        Raises:
            TrainError: one has come in part.
        """
        partial = sorted(name for name, count in self._elements.items() if count != self._flat[name].numel())
        if partial:
            raise TrainError(f"{len(partial)} weights came in part, first {partial[0]!r}")
        return set(self._elements)

    def _place(self, piece: Piece) -> Tensor:
        name, size = piece.name, piece.size
        if name not in self._elements:
            self._check(piece)
            self._elements[name] = 0
        self._elements[name] += size
        flat = self._flat[name]
        return flat if size == flat.numel() else flat.narrow(0, piece.start, size)

    def _check(self, piece: Piece) -> None:
        tensor = self._tensors.get(piece.name)
        if tensor is None:
            raise TrainError(f"weight {piece.name!r} is streamed, and the receiving model has no such tensor")
        if tensor.shape != piece.shape:
            raise TrainError(
                f"weight {piece.name!r} is streamed with shape {piece.shape}, the receiving model has "
                f"{tuple(tensor.shape)}: their config.json disagree"
            )
        if piece.name not in self._flat:
            raise TrainError(f"weight {piece.name!r} is not contiguous in the receiving model: make it so to fill it")
