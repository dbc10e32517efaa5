"""The directory of a run: one run at a time writes to it, and small files are replaced atomically."""

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from mbridge_train.errors import TrainError

LOCK_FILE = ".lock"


class RunLock:
    """Lock that keeps other runs out of `directory` until `close`; a no-op on file systems without locks."""

    def __init__(self, directory: Path) -> None:
        self._path = directory / LOCK_FILE
        self._descriptor: int | None = None

    def take(self) -> str | None:
        """Take the lock and return None, or return the reason why the directory cannot be used."""
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            return f"{self._path.parent} cannot be written: {error.strerror}; give another runner.output_dir"
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.close()
            owner = self._path.read_text(encoding="utf-8").strip() or "another process"
            return (
                f"{self._path.parent} is in use by another run ({owner}): wait until that run ends, or give this one "
                "another runner.experiment_name"
            )
        except OSError:
            return None
        with suppress(OSError):  # the first file that matters reports a full disk
            os.ftruncate(self._descriptor, 0)
            os.write(self._descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        return None

    def close(self) -> None:
        """Let another run use the directory. Idempotent."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Raise `TrainError` for an `OSError` in the block, which writes the file `path` in the directory of a run."""
    try:
        yield
    except OSError as error:
        if (path.parent / "checkpoints" / "latest").is_dir():
            retry = "continue from the last checkpoint with runner.resume_dir=auto"
        else:
            retry = "start the run again: it has no checkpoint yet"
        raise TrainError(
            f"{path} cannot be written: {error.strerror}; make room or remove the cause, then {retry}"
        ) from None


def replace_text(path: Path, text: str) -> None:
    """Replace the file `path` atomically. After a `TrainError` it is unchanged."""
    temporary = path.with_name(path.name + ".tmp")
    with writing(path):
        try:
            temporary.write_text(text, encoding="utf-8")
            temporary.replace(path)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise
