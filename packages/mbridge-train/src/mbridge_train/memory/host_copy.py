"""A group of storages that can be emptied and filled again, with a copy in host memory in between."""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

# Pinned memory is handed out in powers of two: of one large piece, up to half would be lost.
_CHUNK_BYTES = 64 << 20
_ALIGNMENT = 64


class HostCopy:
    """The storages of some tensors, on their device or in host memory. The host memory is kept for the next turn.

    Storages are emptied in place, so that every view of them is what it was once they are filled again. On a GPU the
    host memory is pinned and the copies run on `stream`; a CPU's storages are copied to other memory in the same way.

    Args:
        device: storages elsewhere are left alone.
        stream: for the copies; None on a CPU.
    """

    def __init__(self, device: torch.device, stream: torch.cuda.Stream | None) -> None:
        self.device = device
        self._stream = stream
        self._chunks: list[Tensor] = []
        self._freed: list[tuple[Tensor, int]] | None = None
        self._holds_values = False
        self._arrived: torch.cuda.Event | None = None

    @property
    def is_away(self) -> bool:
        """Whether the storages are empty."""
        return self._freed is not None

    def take(self, tensors: Iterable[Tensor], *, excluding: Iterable[Tensor] = (), keeps_values: bool = True) -> None:
        """Empty the storages of `tensors`.

        Args:
            tensors: several of them may share a storage.
            excluding: tensors whose storages stay.
            keeps_values: copy first; otherwise `give_back` makes memory with nothing meaningful in it.

        Raises:
            RuntimeError: there is not enough host memory; nothing has happened then.
        """
        kept = {tensor.untyped_storage().data_ptr() for tensor in excluding}
        storages = [data for data in _storages(tensors, self.device) if data.data_ptr() not in kept]
        if keeps_values:
            self._reserve(sum(_aligned(data.nbytes) for data in storages))
            self._copy(storages, to_host=True)
        self._freed = [(data, data.nbytes) for data in storages]
        self._holds_values, self._arrived = keeps_values, None
        for data in storages:
            data.untyped_storage().resize_(0)

    def give_back(self) -> None:
        """Fill the storages again. On a GPU the values are there for work that is issued after `wait`."""
        assert self._freed is not None
        for data, size in self._freed:
            data.untyped_storage().resize_(size)
        storages = [data for data, _ in self._freed]
        self._freed = None
        if self._holds_values:
            self._copy(storages, to_host=False)
            if self._stream is not None:
                self._arrived = self._stream.record_event()

    def wait(self) -> None:
        """Let the current stream wait for the copy of `give_back`."""
        if self._arrived is not None:
            torch.cuda.current_stream(self.device).wait_event(self._arrived)
            self._arrived = None

    def _copy(self, storages: list[Tensor], *, to_host: bool) -> None:
        if self._stream is None:
            for data, host in self._pairs(storages):
                (host if to_host else data).copy_(data if to_host else host)
            return
        # What is copied must have been computed; and memory that is filled may still be read by what had it before.
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._stream):
            for data, host in self._pairs(storages):
                (host if to_host else data).copy_(data if to_host else host, non_blocking=True)
        for data in storages:
            data.record_stream(self._stream)  # once freed, it is not given away before the copy has ended

    def _reserve(self, size: int) -> None:
        while len(self._chunks) * _CHUNK_BYTES < size:
            self._chunks.append(torch.empty(_CHUNK_BYTES, dtype=torch.uint8, pin_memory=self._stream is not None))

    def _pairs(self, storages: list[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """(bytes of a storage, their place in host memory): storages lie there one after another, across chunks."""
        position = 0
        for data in storages:
            begin = 0
            while begin < len(data):
                number, within = divmod(position, _CHUNK_BYTES)
                length = min(len(data) - begin, _CHUNK_BYTES - within)
                yield data[begin : begin + length], self._chunks[number][within : within + length]
                begin, position = begin + length, position + length
            position = _aligned(position)


def _storages(tensors: Iterable[Tensor], device: torch.device) -> list[Tensor]:
    """Each storage of `tensors` on `device` once, as a uint8 tensor [bytes] over all of it.

    Left out are those that are empty, and those that cannot be emptied: a CPU's that numpy has seen, as in a save.
    """
    found: dict[int, Tensor] = {}
    for tensor in tensors:
        storage = tensor.untyped_storage()
        is_new = tensor.device == device and storage.nbytes() > 0 and storage.data_ptr() not in found
        if is_new and storage.resizable():
            found[storage.data_ptr()] = torch.empty(0, dtype=torch.uint8, device=device).set_(storage)
    return list(found.values())


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT
