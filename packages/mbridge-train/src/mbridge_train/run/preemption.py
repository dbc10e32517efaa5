"""Preemption: a run that is asked to end finishes its step, saves, writes its report and says that it can be resumed.

Schedulers announce the end of a job with SIGTERM, to the launcher, to all ranks or to one. The launcher passes it on as
SIGUSR1, which SLURM users send as well (`--signal=USR1@120`); any number of SIGUSR1 count as one request. A signal that
comes before the first step or a second SIGTERM ends the run at once.

The main thread may be inside a collective for minutes, where no Python handler runs. So a thread reads the signals from
the file descriptor that Python's own handler writes them to.
"""

import os
import select
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Self

import torch
from torch import distributed

from mbridge_train.run.launch_rank import ERROR_FILE, PREEMPTIBLE_FILE, RESUMABLE

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class Preemption:
    """A context manager around the steps of a run, on every rank.

    Its end after a step at which `agreed` returned True raises `SystemExit` with the code `RESUMABLE`, on all ranks
    together, when every rank has come so far. `seconds` after the first signal this process ends, saved or not; with 0
    signals end it at once.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        # Only the main thread may install handlers.
        self._is_on = seconds > 0 and threading.current_thread() is threading.main_thread()
        self._requested = threading.Event()
        self._stopped = False

    def agreed(self) -> bool:
        """Return whether the run is to end after this step; collective over all ranks, with one integer over gloo."""
        if self._seconds > 0:
            flag = torch.tensor([int(self._requested.is_set())])
            if distributed.is_initialized():
                distributed.all_reduce(flag, op=distributed.ReduceOp.MAX)
            self._stopped = bool(flag.item())
        return self._stopped

    def __enter__(self) -> Self:
        if self._is_on:
            self._pipe, self._write_end = os.pipe()
            os.set_blocking(self._write_end, False)
            self._old_descriptor = signal.set_wakeup_fd(self._write_end)
            self._old_handlers = {number: signal.signal(number, lambda *_: None) for number in _SIGNALS}
            self._thread = threading.Thread(target=self._watch, daemon=True)
            self._thread.start()
            if ERROR_FILE in os.environ:
                self._file = Path(os.environ[ERROR_FILE]).with_name(PREEMPTIBLE_FILE)
                self._file.write_text(str(os.getpid()))
        return self

    def __exit__(self, _kind: object, error: BaseException | None, _traceback: object) -> None:
        if error is None and self._stopped and distributed.is_initialized():
            distributed.barrier()  # the first rank that exits ends the others, which may be writing the report
        if self._is_on:
            if ERROR_FILE in os.environ:
                self._file.unlink(missing_ok=True)
            signal.set_wakeup_fd(self._old_descriptor)
            os.write(self._write_end, b"\0")
            self._thread.join()
            for number, handler in self._old_handlers.items():
                signal.signal(number, handler)
            os.close(self._pipe)
            os.close(self._write_end)
        if error is None and self._stopped:
            raise SystemExit(RESUMABLE)

    def _watch(self) -> None:
        """Read the signals until a zero byte comes."""
        terminations, deadline = 0, float("inf")
        poll = select.poll()  # `select.select` takes descriptors below 1,024 only
        poll.register(self._pipe, select.POLLIN)
        while True:
            left = max(deadline - time.monotonic(), 0)
            readable = poll.poll(None if deadline == float("inf") else 1000 * left)
            if not readable:
                _end(f"the run could not save within runner.preemption_seconds={self._seconds:g} and ends unsaved")
            for number in os.read(self._pipe, 64) if readable else b"":
                if number == 0:
                    return
                if number not in _SIGNALS:
                    continue
                terminations += number == signal.SIGTERM
                if terminations > 1:
                    _end("ended by a second SIGTERM")
                if not self._requested.is_set():
                    self._requested.set()
                    deadline = time.monotonic() + self._seconds
                    if os.environ.get("RANK", "0") == "0":
                        print("asked to end: the run saves after this step", file=sys.stderr, flush=True)


def _end(reason: str) -> None:
    print(f"error: rank {os.environ.get('RANK', '0')}: {reason}", file=sys.stderr, flush=True)
    os._exit(128 + signal.SIGTERM)
