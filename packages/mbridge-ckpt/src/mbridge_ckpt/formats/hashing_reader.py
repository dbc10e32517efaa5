"""Read a file and have its checksum, with the bytes taken from the disk and through the cache once."""

import ctypes
import io
import mmap
import os
from pathlib import Path

import xxhash

BLOCK = 1 << 20  # small enough that what was read is still in the processor's cache when it is hashed
LARGEST_GAP = 4096
HUGE_PAGES_FROM = 4 << 20


class HashingReader(io.RawIOBase):
    """A file that is hashed (XXH3, 128 bits) as its reader passes over it.

    The reader may seek: bytes count when they continue what was hashed, short gaps (headers, padding) are filled, and
    `digest` reads what is missing. A file that is read in order is so read once.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self._size = os.fstat(self._descriptor).st_size
        self._hash = xxhash.xxh3_128()
        self._hashed = 0
        self._position = 0

    def readinto(self, buffer: "memoryview | bytearray", /) -> int:  # type: ignore[override]
        """Fill `buffer`, short only at the end of the file."""
        view = memoryview(buffer).cast("B")
        if len(view) >= HUGE_PAGES_FROM:
            _use_huge_pages(view)
        gap = self._position - self._hashed
        if 0 < gap <= LARGEST_GAP and len(view) > gap:
            self._hash.update(os.pread(self._descriptor, gap, self._hashed))
            self._hashed = self._position
        done = 0
        while done < len(view):
            count = self._read(view[done : done + BLOCK])
            if not count:
                break
            done += count
        return done

    def _read(self, block: memoryview) -> int:
        count = os.preadv(self._descriptor, [block], self._position)
        begin, self._position = self._position, self._position + count
        if begin <= self._hashed < self._position:
            self._hash.update(block[self._hashed - begin : count])
            self._hashed = self._position
        return count

    def digest(self) -> str:
        """Checksum of the whole file, as 32 hexadecimal digits."""
        self.seek(self._hashed)
        buffer = bytearray(min(BLOCK, max(self._size - self._hashed, 1)))
        while self.readinto(buffer):
            pass
        return self._hash.hexdigest()

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        """As for any file."""
        self._position = offset + (0, self._position, self._size)[whence]
        return self._position

    def tell(self) -> int:
        return self._position

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def close(self) -> None:
        if not self.closed:
            os.close(self._descriptor)
        super().close()


def _use_huge_pages(view: memoryview) -> None:
    """Ask for huge pages under fresh memory that is about to be filled: its faults cost more than reading and hashing.

    Only a hint; a kernel that will not heed it loses nothing.
    """
    address = ctypes.addressof(ctypes.c_char.from_buffer(view))
    begin = -(-address // mmap.PAGESIZE) * mmap.PAGESIZE
    length = (address + len(view)) // mmap.PAGESIZE * mmap.PAGESIZE - begin
    ctypes.CDLL(None).madvise(ctypes.c_void_p(begin), ctypes.c_size_t(length), mmap.MADV_HUGEPAGE)
