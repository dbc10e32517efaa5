"""Paths that were read from a file, and the proof that they stay inside a directory."""

import os
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from mbridge_ckpt.errors import UnsafeCheckpointError


def relative_path(text: str) -> PurePosixPath:
    """Check a path that must stay inside a checkpoint: relative, with no empty, `.` or `..` part.

    Raises ValueError with the reason; callers name the file that the path came from.
    """
    if not isinstance(text, str) or not text or "\x00" in text or "\\" in text:
        raise ValueError(f"path {text!r} is empty or holds a NUL or a backslash")
    if text.startswith("/"):
        raise ValueError(f"path {text!r} is absolute")
    parts = text.split("/")
    if any(part in ("", ".", "..") for part in parts):
        raise ValueError(f"path {text!r} has an empty, '.' or '..' part")
    os.fsencode(text)  # UnicodeEncodeError, a ValueError, for text that cannot be a file's name
    return PurePosixPath(text)


def inside(root: Path, text: str) -> Path:
    """Return the path of the file `text` under `root`, which need not exist.

    Raises UnsafeCheckpointError if it ends outside `root`, by its text or through symlinks.
    """
    try:
        path = root / relative_path(text)
    except ValueError as error:
        raise UnsafeCheckpointError(f"{root}: {error}; a checkpoint's files must lie inside its directory") from None
    real_root, real_path = Path(os.path.realpath(root)), Path(os.path.realpath(path))
    if real_root not in real_path.parents:
        raise UnsafeCheckpointError(
            f"{path} is a symlink to {real_path}, outside the checkpoint; replace it with a copy of the file"
        )
    return path


def files_below(root: Path) -> Iterable[str]:
    """Yield the paths of all files and links under `root`, relative to it, in a fixed order."""
    for directory, directories, files in sorted(os.walk(root)):
        links = [name for name in directories if os.path.islink(os.path.join(directory, name))]
        for name in sorted(files + links):
            yield str((Path(directory) / name).relative_to(root))
