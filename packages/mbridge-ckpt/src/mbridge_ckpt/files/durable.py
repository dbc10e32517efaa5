"""Names that are on the disk when we say so: fsync of files and directories, and atomic renames."""

import ctypes
import errno
import os
import uuid
from pathlib import Path

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


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

    After an OSError the old one is still there. The new one may be lost in a power cut.
    """
    temporary = link.with_name(f".{link.name}.{uuid.uuid4().hex[:8]}")
    os.symlink(target, temporary)
    try:
        os.replace(temporary, link)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
