"""The errors of this package: one class for each kind of fault, so that a caller can tell them apart."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import ClassVar


class CheckpointError(Exception):
    """Root of every error a user can cause or meet; the message names the file, the reason and the fix."""

    exit_code: ClassVar[int] = 2


class IncompleteCheckpointError(CheckpointError):
    """Not a committed checkpoint: it has no manifest, or lacks a file that the manifest lists."""


class CorruptCheckpointError(CheckpointError):
    """A file differs from what was written: wrong size, wrong checksum, malformed content."""


class UnsafeCheckpointError(CheckpointError):
    """A file would run code, expand without bound or reach outside its directory; it was not opened further."""


class SaveError(CheckpointError):
    """A save did not commit on any rank; the checkpoints that existed before are untouched."""


class RanksLostError(SaveError):
    """A save could not reach its other ranks: one of them died or is out of step. No save with them can follow."""


class LayoutError(CheckpointError):
    """The requested parallel layout cannot hold this checkpoint, or the checkpoint does not say enough to be cut."""


class SaverBusyError(SaveError):
    """A save in the background was refused because the one before it is still being written."""


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Put `path` before the message of a CheckpointError; a file that cannot be read is a CorruptCheckpointError."""
    try:
        yield
    except FileNotFoundError:
        raise
    except OSError as error:
        raise CorruptCheckpointError(f"{path}: cannot be read: {error.strerror or error}") from None
    except CheckpointError as error:
        raise type(error)(f"{path}: {error}") from None
