"""The host memory that a save in the background copies tensors into, shared with the process that writes them.

A memfd, not a file in /dev/shm, which containers limit to 64 MB. It is mapped once, at the size of the machine's
memory; pages are allocated on demand and then kept, since the first touch of a page costs several times the copy into
it. For tensors on a GPU the pages are pinned as they are allocated, so that copies are asynchronous and run at the full
speed of the bus.
"""

import errno
import mmap
import os
from typing import TYPE_CHECKING

from mbridge_ckpt.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor
    from torch.cuda import Stream

ALIGNMENT = 64
STEP = 16 << 20  # bytes allocated and pinned at a time; one copy from a GPU must not cross two pinned ranges


class StagingBuffer:
    """Shared memory, filled from the beginning at each save. `descriptor` is what another process maps.

    Raises CheckpointError when the memory is not enough.
    """

    def __init__(self) -> None:
        import torch

        self.capacity = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // STEP * STEP
        self.descriptor = os.memfd_create("mbridge-ckpt")
        try:
            os.ftruncate(self.descriptor, self.capacity)  # sparse: no memory is allocated yet
        except OSError as error:
            os.close(self.descriptor)
            raise CheckpointError(f"no shared memory: {error.strerror}; `ulimit -f` must be unlimited") from None
        mapping = mmap.mmap(self.descriptor, self.capacity)
        self._memory = torch.frombuffer(mapping, dtype=torch.uint8)
        self._used = 0
        self.taken = 0  # bytes of memory allocated; they are kept between saves
        self._pinned: dict[int, int] = {}  # offset of each pinned range, and its address
        self._copying: set[Stream] = set()  # CUDA streams with copies that may still run

    def reset(self) -> None:
        """Discard the content; the memory is kept for the next save."""
        self._used = 0

    def store(self, data: bytes | memoryview) -> slice:
        """Copy `data` in and return its place; data that is in this buffer already is not copied."""
        import numpy

        view = memoryview(data).cast("B")
        if not len(view):
            return slice(self._used, self._used)
        source = numpy.frombuffer(view, dtype=numpy.uint8)
        offset = source.ctypes.data - self._memory.data_ptr()
        if not 0 <= offset < self.capacity:
            offset = self._take(len(view))
            memoryview(self._memory[offset : offset + len(view)].numpy())[:] = view
        return slice(offset, offset + len(view))

    def store_tensor(self, tensor: "Tensor") -> "Tensor":
        """Return a contiguous CPU copy of `tensor` in this buffer; of a GPU tensor, to be read after `synchronize`."""
        import torch

        offset = self._take(tensor.nbytes)
        target = self._memory[offset : offset + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        if not tensor.is_cuda:
            return target.copy_(tensor.detach())
        self._copying.add(torch.cuda.current_stream(tensor.device))
        source = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
        position = 0
        while position < len(source):
            begin = offset + position
            self._pin(begin // STEP * STEP)
            end = min(position + STEP - begin % STEP, len(source))
            self._memory[begin : offset + end].copy_(source[position:end], non_blocking=True)
            position = end
        return target

    def synchronize(self) -> None:
        """Wait for the copies from GPUs that are in flight."""
        while self._copying:
            self._copying.pop().synchronize()

    def close(self) -> None:
        """Free the memory, once the other process has ended and no tensor in the buffer is left."""
        import torch

        self.synchronize()
        for address in self._pinned.values():
            torch.cuda.check_error(torch.cuda.cudart().cudaHostUnregister(address))
        del self._memory  # and with it the mapping
        os.close(self.descriptor)

    def _take(self, size: int) -> int:
        """Return the offset of `size` fresh bytes."""
        offset = self._used
        end = offset + -(-size // ALIGNMENT) * ALIGNMENT
        if end > self.taken:
            more = -(-(end - self.taken) // STEP) * STEP
            try:
                if end > self.capacity:
                    raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))
                os.posix_fallocate(self.descriptor, self.taken, more)  # faster than a fault for each page
            except OSError as error:
                raise CheckpointError(
                    f"no memory for a copy of what is saved ({end} bytes so far): {error.strerror}; save without"
                    " AsyncSaver, or give the process more memory"
                ) from None
            self.taken += more
        self._used = end
        return offset

    def _pin(self, offset: int) -> None:
        import torch

        if offset not in self._pinned:
            address = self._memory.data_ptr() + offset
            torch.cuda.check_error(torch.cuda.cudart().cudaHostRegister(address, STEP, 0))
            self._pinned[offset] = address


def map_staging(descriptor: int) -> memoryview:
    """Map the staging buffer, to be read, in another process that inherited its descriptor."""
    return memoryview(mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ))
