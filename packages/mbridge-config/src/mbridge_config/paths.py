"""Look at paths that a user wrote. Nothing here raises: a path that cannot be inspected counts as missing.

`pathlib` raises for the home directory of an unknown user, for names that are too long, and without permission.
"""

import os
from pathlib import Path

is_directory, is_file, is_there = os.path.isdir, os.path.isfile, os.path.exists


def user_path(text: str | Path) -> Path:
    """Return the path with `~` expanded to the home directory, if there is one."""
    return Path(os.path.expanduser(text))


def fault(path: Path) -> str | None:
    """Return why nothing can exist or be created at `path` (name too long, no permission), or None."""
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
    """Return whether both paths lead to the same place, links resolved."""
    try:
        return os.path.realpath(one) == os.path.realpath(other)
    except (OSError, ValueError):
        return one == other


def files_in(directory: Path) -> list[Path]:
    """Return the entries of the directory, sorted; none if it may not be read."""
    try:
        return sorted(directory.iterdir())
    except OSError:
        return []
