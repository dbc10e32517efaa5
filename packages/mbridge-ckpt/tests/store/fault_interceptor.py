"""Counts the system calls that change the disk and strikes at a chosen one: a kill, or an error. Needs no torch."""

import os
import resource
import signal

import mbridge_ckpt.store.publish

CALLS = ("mkdir", "open", "write", "fsync", "rename", "symlink", "replace", "unlink", "rmdir")


class Interceptor:
    """Replaces the functions of `os` from its creation to the end of the process."""

    def __init__(self, kill_at: int | str | None, fail_at: int | str | None, number: int) -> None:
        self.count = 0
        self.trace: list[str] = []
        self._kill_at, self._fail_at, self._number = kill_at, fail_at, number
        for name in CALLS:
            setattr(os, name, self._wrap(name, getattr(os, name)))
        mbridge_ckpt.store.publish.exchange = self._wrap("exchange", mbridge_ckpt.store.publish.exchange)

    def _wrap(self, name: str, real):
        def call(*arguments, **options):
            if name == "open" and not arguments[1] & os.O_CREAT:
                return real(*arguments, **options)
            index, self.count = self.count, self.count + 1
            self.trace.append(name)
            if self._fail_at in (index, name):
                raise OSError(self._number, os.strerror(self._number))
            if self._kill_at == 2 * index:
                if name == "write":
                    real(arguments[0], arguments[1][: len(arguments[1]) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            try:
                return real(*arguments, **options)
            finally:
                if self._kill_at in (2 * index + 1, name):
                    os.kill(os.getpid(), signal.SIGKILL)

        return call


def intercept(kill_at: int | str | None, fail_at: int | str | None, number: int, file_limit: int | None) -> Interceptor:
    """From here on, faults strike this process as the commands of fault_worker.py say."""
    if file_limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))
    return Interceptor(kill_at, fail_at, number)
