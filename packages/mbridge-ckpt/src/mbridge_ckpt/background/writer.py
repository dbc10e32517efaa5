"""The process beside a training rank that writes its saves, and the connection between the two.

One message each way: the rank sends where in the staging buffer the description of a pending save lies, and the writer
answers with its outcome. The end of the connection tells either side that the other is gone, and the kernel kills the
writer when its rank dies: a save that was not committed by then is lost, and nothing that looks finished is left.

The process is not a `multiprocessing.Process`: a fork must not follow CUDA and torch's threads, and a spawned one would
import the user's main module. So the program is started by `subprocess` and only the connection is multiprocessing's.
"""

import ctypes
import json
import os
import signal
import subprocess
import sys
from contextlib import suppress
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection, Pipe

from mbridge_ckpt.background.pending_save import PendingSave
from mbridge_ckpt.background.rendezvous import Seat, meet
from mbridge_ckpt.background.staging import Extent, StagingReader
from mbridge_ckpt.errors import RanksLostError, SaveError
from mbridge_ckpt.manifest.layout import step_directory
from mbridge_ckpt.store.ranks import Ranks

_PROGRAM = "import sys; from mbridge_ckpt.background.writer import main; main(sys.argv[1:])"
_GONE = (BrokenPipeError, ConnectionResetError, EOFError)
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


@dataclass(frozen=True, slots=True)
class SaveOutcome:
    """How a save ended: `error` is None if it was committed; `lost` is set when the other ranks' writers are gone."""

    error: str | None
    lost: bool


class WriterProcess:
    """The rank's side. Starting costs the rank nothing: the process imports what it needs while training goes on."""

    def __init__(self, staging: int, seat: Seat) -> None:
        self._connection, child = Pipe()
        numbers = [str(child.fileno()), str(staging), str(os.getpid())]
        command = [sys.executable, "-P", "-c", _PROGRAM, *numbers, json.dumps(asdict(seat))]
        environment = os.environ | {
            # The modules that this process sees, wherever it has them from.
            "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path),
            "OMP_NUM_THREADS": "1",
            "TORCH_CPP_LOG_LEVEL": "ERROR",  # or a lost writer is told with the stack of torch's store
        }
        with child:
            # Its own session: Ctrl-C in the terminal is for the training, which then still waits for its save.
            self._process = subprocess.Popen(
                command,
                pass_fds=[number for number in (child.fileno(), staging, seat.descriptor) if number >= 0],
                env=environment,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )

    @property
    def process_id(self) -> int:
        return self._process.pid

    def send(self, extent: Extent | None) -> None:
        """Tell where a pending save is described; None ends the process. A dead writer shows in `receive`."""
        with suppress(*_GONE):
            self._connection.send(extent)

    def receive(self, *, wait: bool) -> SaveOutcome | None:
        """Return the next outcome; None if there is none yet. Raises EOFError, saying how, if the process has ended."""
        try:
            if not wait and not self._connection.poll():
                return None
            return SaveOutcome(*self._connection.recv())
        except _GONE:
            code = self._process.wait()
            how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
            raise EOFError(f"the writer process {self._process.pid} {how}") from None

    def close(self) -> None:
        """End the process, after the save that it is writing."""
        self.send(None)  # closing alone would not reach it if a fork of this process still has the connection
        self._connection.close()
        self._process.wait()


def main(arguments: list[str]) -> None:
    """Serve one rank until it ends the connection."""
    _end_with(int(arguments[2]))
    for number in (signal.SIGINT, signal.SIGTERM):  # sent to a whole job to end it; our rank decides when we end
        signal.signal(number, signal.SIG_IGN)
    connection = Connection(int(arguments[0]))
    staging = StagingReader(int(arguments[1]))
    ranks: Ranks | RanksLostError | None
    try:
        ranks = meet(Seat(**json.loads(arguments[3])), connection.fileno())
    except RanksLostError as error:
        ranks = error  # told with the first save; without one, nobody needs the others
    with suppress(*_GONE):
        while ranks is not None and (extent := connection.recv()) is not None:
            outcome = _write(PendingSave.from_json(staging[extent]), staging, ranks)
            connection.send((outcome.error, outcome.lost))
            if outcome.lost:
                break
    os._exit(0)  # without waiting for a thread that is still forming a group


def _end_with(rank_process: int) -> None:
    """Have the kernel kill this process when the rank's process ends, however it ends."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != rank_process:  # it ended before
        os._exit(1)


def _write(pending: PendingSave, staging: StagingReader, ranks: Ranks | RanksLostError) -> SaveOutcome:
    try:
        if isinstance(ranks, RanksLostError):
            final = pending.directory / step_directory(pending.step)
            raise RanksLostError(f"{final} was not saved: {ranks}; earlier checkpoints are untouched")
        pending.write(staging, ranks)
    except Exception as error:  # noqa: BLE001 - told to the rank, whatever it is
        text = str(error) if isinstance(error, SaveError) else f"{type(error).__name__}: {error}"
        return SaveOutcome("; ".join([text, *getattr(error, "__notes__", [])]), lost=isinstance(error, RanksLostError))
    return SaveOutcome(None, lost=False)
