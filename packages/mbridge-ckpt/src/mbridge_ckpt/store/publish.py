"""Turn a finished temporary directory into a checkpoint by a rename, and name the directories of running saves."""

import os
import platform
import re
import shutil
import uuid
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from importlib import metadata as installed
from pathlib import Path

from mbridge_ckpt.errors import CheckpointError
from mbridge_ckpt.files.durable import exchange, fsync_path, fsync_tree_directories, point_link
from mbridge_ckpt.manifest.layout import LATEST_LINK, step_directory, step_of
from mbridge_ckpt.manifest.manifest import read_manifest

WRITER_FILE = ".writer"
_LEFTOVER = re.compile(r"\.global_step_([0-9]+)\.(saving|replaced|deleting)-[0-9a-f]{12}")
_LEFTOVER_LINK = re.compile(rf"\.{LATEST_LINK}\.[0-9a-f]{{8}}")  # of `point_link`


@dataclass(frozen=True, slots=True)
class Leftover:
    """A hidden directory beside the checkpoints: of a save ("saving"), of an old checkpoint that a save moved aside
    ("replaced"), or of one that `prune` was removing ("deleting"); or a link that was to become `latest` ("link")."""

    path: Path
    step: int
    kind: str


def temporary_directory(directory: Path, step: int, kind: str = "saving") -> Path:
    """Return a new name beside the final one, so that a rename stays in one file system, hidden from `ls` and globs."""
    return directory / f".{step_directory(step)}.{kind}-{uuid.uuid4().hex[:12]}"


def find_leftovers(directory: Path) -> list[Leftover]:
    """List what interrupted saves and removals left in a checkpoints directory, by name."""
    found = []
    for path in sorted(directory.iterdir()):
        match = _LEFTOVER.fullmatch(path.name)
        if _LEFTOVER_LINK.fullmatch(path.name):
            with suppress(OSError):  # of a live save it may be gone by now
                found.append(Leftover(path, step_of(os.readlink(path)) or 0, "link"))
        elif match and path.is_dir() and not path.is_symlink():
            found.append(Leftover(path, int(match[1]), match[2]))
    return found


def commit_time(directory: Path) -> str:
    """Return the time of a manifest that is about to be committed: now, or later if the last one had a fast clock."""
    now = datetime.now(UTC)
    with suppress(OSError, RuntimeError, CheckpointError, ValueError, TypeError, OverflowError):
        last = datetime.fromisoformat(read_manifest((directory / LATEST_LINK).resolve(strict=True)).created)
        now = max(now, last + timedelta(milliseconds=1))
    return now.isoformat(timespec="milliseconds")


def publish(temporary: Path, step: int) -> Path:
    """Rename a complete temporary directory to `global_step_N`, then move `latest`; durable on return.

    A checkpoint of the same step is replaced: by one atomic exchange where the file system can, else it is first
    moved aside, and `prune` moves it back should the process die between the two renames. An OSError at any point
    leaves both under the names that they had.
    """
    directory, final = temporary.parent, temporary.parent / step_directory(step)
    fsync_tree_directories(temporary)
    old = _take_name(temporary, final, step)
    try:
        fsync_path(directory)
        point_link(directory / LATEST_LINK, final.name)
    except OSError:
        if old != temporary:
            os.rename(final, temporary)
            if old is not None:
                os.rename(old, final)
        else:
            exchange(temporary, final)
        raise
    with suppress(OSError):  # the checkpoint is durable; a power cut could at most bring back the old `latest`
        fsync_path(directory)
    if old is not None:
        shutil.rmtree(old, ignore_errors=True)
    return final


def _take_name(temporary: Path, final: Path, step: int) -> Path | None:
    """Rename `temporary` to `final`; returns where a checkpoint that had this name is now, if there was one."""
    if not os.path.lexists(final):
        os.rename(temporary, final)
        return None
    if exchange(temporary, final):
        return temporary
    old = temporary_directory(final.parent, step, "replaced")
    os.rename(final, old)
    try:
        os.rename(temporary, final)
    except OSError:
        os.rename(old, final)
        raise
    return old


def writer_versions() -> dict[str, str]:
    """Return the versions of the software that writes the checkpoint."""
    versions = {"python": platform.python_version()}
    for name in ("mbridge-ckpt", "torch"):
        try:
            versions[name] = installed.version(name)
        except installed.PackageNotFoundError:
            versions[name] = "unknown"
    return versions
