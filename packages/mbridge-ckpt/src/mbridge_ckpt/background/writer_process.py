"""The process beside a training rank that writes its saves, and the connection between the two.

The rank sends requests, and the writer answers each. The end of the connection tells either side that the other is
gone, and the kernel kills the writer when its rank dies: a save that was not committed by then is lost, and nothing
that looks finished is left.

The process is not a `multiprocessing.Process`: a fork must not follow CUDA and torch's threads, and a spawned one would
import the user's main module. So the program is started by `subprocess` and only the connection is multiprocessing's.
"""

import ctypes
import os
import signal
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, Pipe
from typing import Any

from mbridge_ckpt.background.pending_save import PendingSave
from mbridge_ckpt.background.staging import map_staging
from mbridge_ckpt.errors import RanksLostError, SaveError
from mbridge_ckpt.store.ranks import Ranks

_PROGRAM = "import sys; from mbridge_ckpt.background.writer_process import main; main(*map(int, sys.argv[1:]))"
_GONE = (BrokenPipeError, ConnectionResetError, EOFError)
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


@dataclass(frozen=True, slots=True)
class Meeting:
    """A request to form a group with the writers of the other ranks, through a store of the first one at `host`.

    The port of the store is 0 in a first request, which the first writer answers with the port, the others with 0.
    """

    host: str
    port: int


@dataclass(frozen=True, slots=True)
class Outcome:
    """The answer to a request. `error` is None if it was carried out; `lost` if the other ranks' writers are gone."""

    error: str | None = None
    lost: bool = False
    port: int = 0


class WriterProcess:
    """The rank's side. Starting costs the rank nothing: the process imports what it needs while training goes on."""

    def __init__(self, staging: int, ranks: Ranks) -> None:
        self._connection, child = Pipe()
        numbers = [child.fileno(), staging, os.getpid(), ranks.rank, ranks.size, ranks.global_rank]
        environment = os.environ | {
            # The modules that this process sees, wherever it has them from.
            "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path),
            "OMP_NUM_THREADS": "1",
            "TORCH_CPP_LOG_LEVEL": "ERROR",  # or a lost writer is told with the stack of torch's store
        }
        with child:
            # Its own session: Ctrl-C in the terminal is for the training, which then still waits for its save.
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-c", _PROGRAM, *map(str, numbers)],
                pass_fds=(child.fileno(), staging),
                env=environment,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )

    @property
    def process_id(self) -> int:
        return self._process.pid

    def send(self, request: PendingSave | Meeting | None) -> None:
        """Send a request; None ends the process. A dead writer shows in `receive`."""
        with suppress(*_GONE):
            self._connection.send(request)

    def receive(self, seconds: float | None) -> Outcome | None:
        """Return the next answer, waiting for at most `seconds` (None: without end); None if there is none yet.

        Raises EOFError, saying how, if the process has ended.
        """
        try:
            if not self._connection.poll(seconds):
                return None
            outcome: Outcome = self._connection.recv()
            return outcome
        except _GONE:
            code = self._process.wait()
            how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
            raise EOFError(f"the writer process {self._process.pid} {how}") from None

    def kill(self) -> None:
        """End the process at once, whatever it does."""
        self._process.kill()

    def close(self) -> None:
        """End the process, after the save that it is writing."""
        self.send(None)  # closing alone would not reach it if a fork of this process still has the connection
        self._connection.close()
        self._process.wait()


def main(connected: int, staging: int, rank_process: int, rank: int, size: int, global_rank: int) -> None:
    """Serve one rank until it ends the connection."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # the kernel kills this process when its rank ends
    if os.getppid() != rank_process:  # it ended before
        os._exit(1)
    for number in (signal.SIGINT, signal.SIGTERM):  # sent to a whole job to end it; our rank decides when we end
        signal.signal(number, signal.SIG_IGN)
    if size > 1:
        import torch.distributed  # noqa: F401 - takes seconds, which training need not wait for
    connection, writer = Connection(connected), _Writer(map_staging(staging), rank, size, global_rank)
    with suppress(*_GONE):
        while (request := connection.recv()) is not None:
            outcome = writer.answer(request)
            connection.send(outcome)
            if outcome.lost:
                break
    os._exit(0)  # without waiting for torch's threads


class _Writer:
    def __init__(self, staging: memoryview, rank: int, size: int, global_rank: int) -> None:
        self._staging = staging
        self._rank, self._size = rank, size
        self._ranks = Ranks(global_rank=global_rank)
        self._store: Any = None  # of the first writer, by which all find each other

    def answer(self, request: PendingSave | Meeting) -> Outcome:
        try:
            if isinstance(request, PendingSave):
                request.write(self._staging, self._ranks)
                return Outcome()
            return Outcome(port=self._meet(request.host, request.port))
        except Exception as error:  # noqa: BLE001 - told to the rank, whatever it is
            text = str(error) if isinstance(error, SaveError) else f"{type(error).__name__}: {error}"
            notes = getattr(error, "__notes__", [])
            return Outcome("; ".join([text, *notes]), lost=isinstance(error, RanksLostError))

    def _meet(self, host: str, port: int) -> int:
        import torch.distributed as dist

        timeout = timedelta(minutes=1)  # all are ready
        if not port:
            if self._rank == 0:
                self._store = dist.TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=timeout)
            return self._store.port if self._store is not None else 0
        store = self._store or dist.TCPStore(host, port, timeout=timeout)
        dist.init_process_group("gloo", store=store, rank=self._rank, world_size=self._size)
        self._ranks = Ranks(global_rank=self._ranks.global_rank)
        return port
