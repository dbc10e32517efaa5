"""Copies of storages in host memory: to empty the storages and refill them, or to swap their values."""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

# Pinned memory is allocated in powers of two, so up to half of one large allocation would be wasted.
_CHUNK_BYTES = 64 << 20
_ALIGNMENT = 64


class HostCopy:
    """The values of some tensors' storages in host memory, which is pinned if there is a GPU, and kept for reuse.

    Storages that are not on `device` are left alone. `take` and `give_back` copy on `stream`; None: the current one.
    """

    def __init__(self, device: torch.device, stream: torch.cuda.Stream | None = None) -> None:
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
        """Empty the storages of `tensors` but not those of `excluding`.

        Without `keeps_values`, `give_back` leaves them uninitialized. Raises `RuntimeError` if there is not enough host
        memory; then nothing was emptied.
        """
        kept = {tensor.untyped_storage().data_ptr() for tensor in excluding}
        storages = [
            data
            for data in _storages(tensors, self.device)
            # A CPU storage that numpy shares, for example after a save, cannot be emptied.
            if data.data_ptr() not in kept and data.untyped_storage().resizable()
        ]
        if keeps_values:
            self._reserve(storages)
            self._copy(storages, to_host=True)
        self._freed = [(data, data.nbytes) for data in storages]
        self._holds_values, self._arrived = keeps_values, None
        for data in storages:
            data.untyped_storage().resize_(0)

    def give_back(self) -> None:
        """Refill the storages. On a GPU, only work that is issued after `wait` sees the values."""
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
        """Make the current stream wait for the copy of `give_back`."""
        if self._arrived is not None:
            torch.cuda.current_stream(self.device).wait_event(self._arrived)
            self._arrived = None

    def save(self, tensors: Iterable[Tensor]) -> None:
        """Copy the storages of `tensors` to host memory without emptying them. Raise the errors of `take`."""
        storages = _storages(tensors, self.device)
        self._reserve(storages)
        self._copy(storages, to_host=True)

    @torch.no_grad()
    def exchange(self, tensors: Iterable[Tensor]) -> None:
        """Swap the values of `tensors`, those of `save`, with the values in host memory, on the current stream."""
        for data, host in self._pairs(_storages(tensors, self.device)):
            held = data.clone()
            data.copy_(host, non_blocking=True)
            host.copy_(held, non_blocking=True)

    def _copy(self, storages: list[Tensor], *, to_host: bool) -> None:
        if self._stream is None:
            for data, host in self._pairs(storages):
                (host if to_host else data).copy_(data if to_host else host)
            return
        # The source may still be computed, and the previous user of refilled memory may still read it.
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._stream):
            for data, host in self._pairs(storages):
                (host if to_host else data).copy_(data if to_host else host, non_blocking=True)
        for data in storages:
            data.record_stream(self._stream)  # keeps freed memory from being reused before the copy has ended

    def _reserve(self, storages: list[Tensor]) -> None:
        size = sum(_aligned(data.nbytes) for data in storages)
        while len(self._chunks) * _CHUNK_BYTES < size:
            self._chunks.append(torch.empty(_CHUNK_BYTES, dtype=torch.uint8, pin_memory=self.device.type == "cuda"))

    def _pairs(self, storages: list[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (bytes of a storage, their copy in host memory), where storages are contiguous across chunks."""
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
    """Return each non-empty storage of `tensors` on `device` once, as a uint8 tensor [bytes] over all of it."""
    found: dict[int, Tensor] = {}
    for tensor in tensors:
        storage = tensor.untyped_storage()
        if tensor.device == device and storage.nbytes() > 0 and storage.data_ptr() not in found:
            found[storage.data_ptr()] = torch.empty(0, dtype=torch.uint8, device=device).set_(storage)
    return list(found.values())


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT
