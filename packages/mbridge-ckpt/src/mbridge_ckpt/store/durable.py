"""Bytes that are on the disk when we say so: hashed writing, fsync of files and directories, atomic renames."""

import ctypes
import errno
import os
import uuid
from pathlib import Path

import xxhash

from mbridge_ckpt.formats.hashing_reader import HashingReader

READ_BLOCK = 8 << 20
WRITE_BLOCK = 4 << 20  # hashed and then written while it is still in the processor's cache
_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


class HashingFile:
    """A new file that is hashed (XXH3, 128 bits) while it is written, so that the checksum is of what was meant.

    A checksum taken by reading the file back would bless whatever the disk made of it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.bytes = 0
        self._started = 0
        self._hash = xxhash.xxh3_128()
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        self._descriptor = os.open(path, flags, 0o666)

    def write(self, data: bytes | memoryview) -> int:
        """Write all of `data`; a short write goes on until it succeeds or raises OSError."""
        view = memoryview(data).cast("B")
        for begin in range(0, len(view), WRITE_BLOCK):
            block = view[begin : begin + WRITE_BLOCK]
            self._hash.update(block)
            while len(block):
                count = os.write(self._descriptor, block)
                self.bytes += count
                block = block[count:]
            if self.bytes - self._started >= WRITE_BLOCK:
                self._start_writing()
        return len(view)

    def _start_writing(self) -> None:
        """Have the disk begin now rather than at fsync: Linux starts to write what it is told will not be needed."""
        os.posix_fadvise(self._descriptor, self._started, self.bytes - self._started, os.POSIX_FADV_DONTNEED)
        self._started = self.bytes

    def close(self) -> str:
        """fsync and close; returns the checksum as 32 hexadecimal digits."""
        try:
            os.fsync(self._descriptor)
        finally:
            self.abandon()
        return self._hash.hexdigest()

    def abandon(self) -> None:
        """Close without fsync, after a failure."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def hash_bytes(data: bytes) -> str:
    """XXH3-128 of `data` as 32 hexadecimal digits."""
    return xxhash.xxh3_128(data).hexdigest()


def hash_file(path: Path) -> tuple[int, str]:
    """Size of a file and its XXH3-128; memory is one block."""
    with HashingReader(path) as stream:
        digest = stream.digest()
        return stream.tell(), digest


def fsync_path(path: Path) -> None:
    """fsync a file or a directory (a directory's fsync is what makes names in it survive a power cut)."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_tree_directories(root: Path) -> None:
    """fsync every directory under `root`, innermost first, then `root`."""
    for directory, _, _ in os.walk(root, topdown=False):
        fsync_path(Path(directory))


def exchange(first: Path, second: Path) -> bool:
    """Swap two names atomically (renameat2, RENAME_EXCHANGE); False where the file system cannot."""
    library = ctypes.CDLL(None, use_errno=True)
    if not hasattr(library, "renameat2"):
        return False
    if library.renameat2(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
        return False
    raise OSError(number, os.strerror(number), str(first), None, str(second))


def point_link(link: Path, target: str) -> None:
    """Make `link` a symlink to `target` in one rename, so that a reader sees the old one or the new one.

    An OSError means that the old one is still there. The new one may get lost in a power cut.
    """
    temporary = link.with_name(f".{link.name}.{uuid.uuid4().hex[:8]}")
    os.symlink(target, temporary)
    try:
        os.replace(temporary, link)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
