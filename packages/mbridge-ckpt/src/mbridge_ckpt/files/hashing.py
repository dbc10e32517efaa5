"""Write and read files and compute their checksum (XXH3, 128 bits) in the same pass."""

import ctypes
import io
import mmap
import os
from pathlib import Path
from typing import Self

import xxhash

READ_BLOCK = 8 << 20  # for files that are only copied
BLOCK = 1 << 20  # small enough to be still in the processor's cache when it is hashed
WRITE_BLOCK = 4 << 20  # likewise, between hashing and writing
LARGEST_GAP = 4096
HUGE_PAGES_FROM = 4 << 20


def hash_bytes(data: bytes) -> str:
    """Return the XXH3-128 of `data` as 32 hexadecimal digits."""
    return xxhash.xxh3_128(data).hexdigest()


def hash_file(path: Path) -> tuple[int, str]:
    """Return the size of a file and its XXH3-128; memory is one block."""
    with HashingReader(path) as stream:
        digest = stream.digest()
        return stream.tell(), digest


class HashingFile:
    """A new file that is hashed while it is written.

    A checksum of the bytes read back would not notice if the disk had changed them. The end of a `with` block closes it
    without fsync, unless `close` was called.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.bytes = 0
        self._started = 0
        self._hash = xxhash.xxh3_128()
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        self._descriptor = os.open(path, flags, 0o666)

    def write(self, data: bytes | memoryview) -> int:
        """Write all of `data`, continuing after short writes; raises OSError."""
        view = memoryview(data).cast("B")
        for begin in range(0, len(view), WRITE_BLOCK):
            block = view[begin : begin + WRITE_BLOCK]
            self._hash.update(block)
            while len(block):
                count = os.write(self._descriptor, block)
                self.bytes += count
                block = block[count:]
            # The disk starts now rather than at fsync: Linux begins to write pages that it is told to drop.
            if (waiting := self.bytes - self._started) >= WRITE_BLOCK:
                os.posix_fadvise(self._descriptor, self._started, waiting, os.POSIX_FADV_DONTNEED)
                self._started = self.bytes
        return len(view)

    def close(self) -> str:
        """fsync and close; returns the checksum as 32 hexadecimal digits."""
        with self:
            os.fsync(self._descriptor)
        return self._hash.hexdigest()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


class HashingReader(io.FileIO):
    """A file that is hashed while it is read.

    The reader may seek: bytes are hashed if they continue the hashed part, short gaps (headers, padding) are filled,
    and `digest` reads the rest. A file that is read in order is therefore read once.
    """

    # FileIO has faster ones, which do not call `readinto`.
    read, readall = io.RawIOBase.read, io.RawIOBase.readall  # type: ignore[assignment]  # typeshed's take no None

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._hash = xxhash.xxh3_128()
        self._hashed = 0

    def readinto(self, buffer: "memoryview | bytearray", /) -> int:  # type: ignore[override]
        """Fill `buffer`; short only at the end of the file."""
        view = memoryview(buffer).cast("B")
        if len(view) >= HUGE_PAGES_FROM:
            _use_huge_pages(view)
        gap = self.tell() - self._hashed
        if 0 < gap <= LARGEST_GAP and len(view) > gap:
            self._hash.update(os.pread(self.fileno(), gap, self._hashed))
            self._hashed += gap
        done = 0
        while count := self._read(view[done : done + BLOCK]):
            done += count
        return done

    def _read(self, block: memoryview) -> int:
        begin = self.tell()
        count = os.preadv(self.fileno(), [block], begin)
        end = self.seek(begin + count)
        if begin <= self._hashed < end:
            self._hash.update(block[self._hashed - begin : count])
            self._hashed = end
        return count

    def digest(self) -> str:
        """Return the checksum of the whole file, as 32 hexadecimal digits."""
        self.seek(self._hashed)
        buffer = bytearray(BLOCK)
        while self.readinto(buffer):
            pass
        return self._hash.hexdigest()


def _use_huge_pages(view: memoryview) -> None:
    """Ask for huge pages for fresh memory, whose page faults cost more than reading and hashing. Only a hint."""
    address = ctypes.addressof(ctypes.c_char.from_buffer(view))
    begin = -(-address // mmap.PAGESIZE) * mmap.PAGESIZE
    length = (address + len(view)) // mmap.PAGESIZE * mmap.PAGESIZE - begin
    ctypes.CDLL(None).madvise(ctypes.c_void_p(begin), ctypes.c_size_t(length), mmap.MADV_HUGEPAGE)
