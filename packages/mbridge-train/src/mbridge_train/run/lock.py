"""One run a directory."""

import fcntl
import os
import socket
from contextlib import suppress
from pathlib import Path

LOCK_FILE = ".lock"


class RunLock:
    """Keeps a second run out of a directory as long as this process lives; without effect where there are no locks."""

    def __init__(self, directory: Path) -> None:
        self._path = directory / LOCK_FILE
        self._descriptor: int | None = None

    def take(self) -> str | None:
        """Take it; or why it, or anything in the directory, cannot be had."""
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            return f"{self._path.parent} cannot be written: {error.strerror}; give another runner.output_dir"
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = self._path.read_text(encoding="utf-8").strip() or "another process"
            return (
                f"{self._path.parent} is in use by another run ({owner}): wait for its end, or give this one another "
                "runner.experiment_name"
            )
        except OSError:
            return None
        with suppress(OSError):  # a full disk is said by whoever has more to write
            os.ftruncate(self._descriptor, 0)
            os.write(self._descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        return None

    def __del__(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
