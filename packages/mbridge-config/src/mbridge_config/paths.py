"""Paths that a user wrote. Nothing here raises: what cannot be looked at, or cannot be a path, is not there.

`pathlib` raises for a home directory that nobody has, for names that are too long, and for directories of others.
"""

import os
from pathlib import Path


def user_path(text: str | Path) -> Path:
    """The path, with the home directory in place of `~` where there is one."""
    return Path(os.path.expanduser(text))


def is_directory(path: str | Path) -> bool:
    """Whether there is such a directory."""
    return os.path.isdir(path)


def is_file(path: str | Path) -> bool:
    """Whether there is such a file."""
    return os.path.isfile(path)


def is_there(path: str | Path) -> bool:
    """Whether there is such a file or directory."""
    return os.path.exists(path)


def fault(path: Path) -> str | None:
    """Why nothing can be at `path`, nor be made there: a name that is too long, a directory of others; else None."""
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        return error.strerror
    except ValueError as error:
        return str(error)
    return None


def same_place(one: Path, other: Path) -> bool:
    """Whether both lead to one place, over whatever links."""
    try:
        return os.path.realpath(one) == os.path.realpath(other)
    except (OSError, ValueError):
        return one == other


def files_in(directory: Path) -> list[Path]:
    """What the directory holds; nothing where it may not be read."""
    try:
        return sorted(directory.iterdir())
    except OSError:
        return []
