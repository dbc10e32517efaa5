"""The process beside a training rank that writes its saves, and the connection between the two.

One message each way: the rank sends where in the staging buffer the description of a pending save lies, and the writer
answers with its outcome. A pending save is complete in shared memory before the message is sent, so a writer whose
rank dies still finishes what it was given. The end of the connection tells either side that the other is gone.

The process is not a `multiprocessing.Process`: a fork must not follow CUDA and torch's threads, and a spawned one would
import the user's main module. So the program is started by `subprocess` and only the connection is multiprocessing's.
"""

import json
import os
import signal
import subprocess
import sys
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, Pipe

from mbridge_ckpt.background.pending_save import PendingSave
from mbridge_ckpt.background.staging import Extent, StagingReader
from mbridge_ckpt.errors import RanksLostError, SaveError
from mbridge_ckpt.store.ranks import Ranks

_PROGRAM = "import sys; from mbridge_ckpt.background.writer import main; main(sys.argv[1:])"
_GONE = (BrokenPipeError, ConnectionResetError, EOFError)


@dataclass(frozen=True, kw_only=True, slots=True)
class Rendezvous:
    """Which rank of how many a writer serves, and the TCP store where the writers find each other."""

    rank: int
    size: int
    global_rank: int
    host: str
    port: int


@dataclass(frozen=True, slots=True)
class SaveOutcome:
    """How a save ended: `error` is None if it was committed; `lost` is set when the other ranks' writers are gone."""

    error: str | None
    lost: bool


class WriterProcess:
    """The rank's side. Starting costs the rank nothing: the process imports what it needs while training goes on."""

    def __init__(self, staging: int, rendezvous: Rendezvous) -> None:
        self._connection, child = Pipe()
        command = [sys.executable, "-P", "-c", _PROGRAM, str(child.fileno()), str(staging)]
        environment = os.environ | {
            # The modules that this process sees, wherever it has them from.
            "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path),
            "OMP_NUM_THREADS": "1",
        }
        with child:
            # Its own session: Ctrl-C in the terminal is for the training, which then still waits for its save.
            self._process = subprocess.Popen(
                [*command, json.dumps(asdict(rendezvous))],
                pass_fds=(child.fileno(), staging),
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
    for number in (signal.SIGINT, signal.SIGTERM):  # sent to a whole job to end it; our rank decides when we end
        signal.signal(number, signal.SIG_IGN)
    connection = Connection(int(arguments[0]))
    staging = StagingReader(int(arguments[1]))
    ranks = _join(Rendezvous(**json.loads(arguments[2])))
    with suppress(*_GONE):
        while (extent := connection.recv()) is not None:
            outcome = _write(PendingSave.from_json(staging[extent]), staging, ranks)
            connection.send((outcome.error, outcome.lost))
            if outcome.lost:
                return


def _write(pending: PendingSave, staging: StagingReader, ranks: Ranks) -> SaveOutcome:
    try:
        pending.write(staging, ranks)
    except Exception as error:  # noqa: BLE001 - told to the rank, whatever it is
        text = str(error) if isinstance(error, SaveError) else f"{type(error).__name__}: {error}"
        return SaveOutcome("; ".join([text, *getattr(error, "__notes__", [])]), lost=isinstance(error, RanksLostError))
    return SaveOutcome(None, lost=False)


def _join(rendezvous: Rendezvous) -> Ranks:
    """Meet the writers of the other ranks, in their own gloo group."""
    if rendezvous.size > 1:
        import torch.distributed as dist

        store = dist.TCPStore(rendezvous.host, rendezvous.port, is_master=False, timeout=timedelta(minutes=10))
        dist.init_process_group("gloo", store=store, rank=rendezvous.rank, world_size=rendezvous.size)
    ranks = Ranks()
    ranks.global_rank = rendezvous.global_rank
    return ranks
