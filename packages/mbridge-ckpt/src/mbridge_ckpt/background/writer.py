"""The process beside a training rank that writes its saves, and the socket between the two.

One message each way: the rank sends where in the arena a snapshot's description lies, as two integers, and the writer
answers how the save ended, as JSON. A snapshot is complete in shared memory before the message is sent, so a writer
whose rank dies still finishes what it was given. The end of the socket tells either side that the other is gone.
"""

import json
import os
import signal
import socket
import struct
import subprocess
import sys
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import timedelta

from mbridge_ckpt.background.pending_save import Snapshot
from mbridge_ckpt.background.shared_memory import ArenaReader, Extent
from mbridge_ckpt.errors import RanksLostError, SaveError
from mbridge_ckpt.store.ranks import Ranks

_EXTENT = struct.Struct("<QQ")
_PROGRAM = "import sys; from mbridge_ckpt.background.writer import main; main(sys.argv[1:])"
_MAXIMUM_ANSWER = 60_000  # one message of a socket pair; a longer reason is cut


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """Which rank of how many a writer serves, and the TCP store where the writers find each other."""

    rank: int
    size: int
    global_rank: int
    host: str
    port: int


@dataclass(frozen=True, slots=True)
class Answer:
    """How a save ended: `error` is None if it was committed; `lost` is set when the other ranks' writers are gone."""

    error: str | None
    lost: bool


class WriterProcess:
    """The rank's side. Starting costs the rank nothing: the process imports what it needs while training goes on."""

    def __init__(self, arena: int, place: Place) -> None:
        self._socket, child = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        command = [sys.executable, "-P", "-c", _PROGRAM, str(child.fileno()), str(arena)]
        # The modules that this process sees, wherever it has them from.
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path),
            "OMP_NUM_THREADS": "1",
        }
        with child:
            # A session of its own: Ctrl-C in the terminal is for the training, which then still waits for its save.
            self._process = subprocess.Popen(
                [*command, json.dumps(asdict(place))],
                pass_fds=(child.fileno(), arena),
                env=environment,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )

    @property
    def process_id(self) -> int:
        return self._process.pid

    def send(self, extent: Extent) -> None:
        """Tell where the description of a snapshot lies. A dead writer shows in `receive`."""
        with suppress(BrokenPipeError, ConnectionResetError):
            self._socket.send(_EXTENT.pack(*extent))

    def receive(self, *, wait: bool) -> Answer | None:
        """The next answer; None if there is none yet. Raises EOFError, saying how, when the process has ended."""
        try:
            data = self._socket.recv(_MAXIMUM_ANSWER * 2, 0 if wait else socket.MSG_DONTWAIT)
        except BlockingIOError:
            return None
        except ConnectionResetError:
            data = b""
        if data:
            return Answer(**json.loads(data))
        code = self._process.wait()
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
        raise EOFError(f"the writer process {self._process.pid} {how}")

    def close(self) -> None:
        """End the process, after the save that it is at."""
        self._socket.shutdown(socket.SHUT_RDWR)  # reaches the writer even if a fork of ours still has the socket
        self._socket.close()
        self._process.wait()


def main(arguments: list[str]) -> None:
    """Serve one rank until it closes its end of the socket."""
    for number in (signal.SIGINT, signal.SIGTERM):  # sent to a whole job to end it; our rank decides when we end
        signal.signal(number, signal.SIG_IGN)
    channel = socket.socket(fileno=int(arguments[0]))
    arena = ArenaReader(int(arguments[1]))
    ranks = _join(Place(**json.loads(arguments[2])))
    with suppress(BrokenPipeError, ConnectionResetError):
        while message := channel.recv(_EXTENT.size):
            answer = _write(Snapshot.from_json(arena[_EXTENT.unpack(message)]), arena, ranks)
            channel.send(json.dumps(asdict(answer)).encode())
            if answer.lost:
                return


def _write(snapshot: Snapshot, arena: ArenaReader, ranks: Ranks) -> Answer:
    try:
        snapshot.write(arena, ranks)
    except Exception as error:  # noqa: BLE001 - told to the rank, whatever it is
        text = str(error) if isinstance(error, SaveError) else f"{type(error).__name__}: {error}"
        text = "; ".join([text, *getattr(error, "__notes__", [])])
        return Answer(text[:_MAXIMUM_ANSWER], lost=isinstance(error, RanksLostError))
    return Answer(None, lost=False)


def _join(place: Place) -> Ranks:
    """Meet the writers of the other ranks, in a gloo group of their own."""
    if place.size > 1:
        import torch.distributed

        store = torch.distributed.TCPStore(place.host, place.port, is_master=False, timeout=timedelta(minutes=10))
        torch.distributed.init_process_group("gloo", store=store, rank=place.rank, world_size=place.size)
    ranks = Ranks()
    ranks.global_rank = place.global_rank
    return ranks
