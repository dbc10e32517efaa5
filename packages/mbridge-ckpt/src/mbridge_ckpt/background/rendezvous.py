"""How the writers of all ranks find each other, and how each notices at once that another has died on the way.

The first rank listens, every other rank connects to it and names itself, and each rank passes its end to its writer.
So the connections exist before the writers run and belong to them alone: the kernel closes them when a writer dies, at
any moment of its start. The first writer waits until all others have imported torch, tells them the port of a store,
and all form a gloo group. From then on gloo's own connections show a death.

Writers import torch and form the group in a thread, since neither can be interrupted.
"""

import os
import queue
import select
import socket
import struct
import threading
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta

from mbridge_ckpt.errors import RanksLostError
from mbridge_ckpt.store.ranks import Ranks

_HELLO = struct.Struct("!16sI")  # token, rank
_HELLO_SECONDS = 5.0  # until a connection that names itself wrongly or not at all is dropped
_CONNECT_SECONDS = 60.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Seat:
    """A writer's place among all writers.

    Attributes:
        rank, size: within the group that saves.
        global_rank: the rank's number in messages.
        host: address of the first rank.
        token: hexadecimal secret of this rendezvous, known to its ranks alone.
        descriptor: socket that the first writer listens on; of another writer the connection to the first. -1 if there
            is only one.
    """

    rank: int
    size: int
    global_rank: int
    host: str = ""
    token: str = ""
    descriptor: int = -1


class Rendezvous:
    """The rank's side, a context manager: in its block the rank starts its writer. Collective over `ranks`.

    Raises RuntimeError on every rank, when the block ends, if a rank could not connect.
    """

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._socket: socket.socket | None = None
        self._failure: str | None = None
        host, port, token = "", 0, os.urandom(16)
        if ranks.size > 1:
            on_one_host = len(set(ranks.gather(socket.gethostname()))) == 1
            if ranks.rank == 0:
                # Over several hosts, rank 0 of the job is known by an address that the others are sure to reach.
                known = os.environ.get("MASTER_ADDR", "") if ranks.global_rank == 0 else ""
                host = "127.0.0.1" if on_one_host else known or socket.getfqdn()
                self._socket = socket.create_server(("127.0.0.1" if on_one_host else "", 0), backlog=ranks.size)
                port = self._socket.getsockname()[1]
            host, port, token = ranks.from_first((host, port, token))
            if ranks.rank > 0:
                self._connect(host, port, token)
        self.seat = Seat(
            rank=ranks.rank,
            size=ranks.size,
            global_rank=ranks.global_rank,
            host=host,
            token=token.hex(),
            descriptor=-1 if self._socket is None else self._socket.fileno(),
        )

    def _connect(self, host: str, port: int, token: bytes) -> None:
        try:
            self._socket = socket.create_connection((host, port), timeout=_CONNECT_SECONDS)
            self._socket.settimeout(None)
            _notice_dead_hosts(self._socket)
            self._socket.sendall(_HELLO.pack(token, self._ranks.global_rank))
        except OSError as error:
            self._failure = f"rank {self._ranks.global_rank} ({socket.gethostname()}) cannot reach {host}: {error}"

    def __enter__(self) -> Seat:
        return self.seat

    def __exit__(self, *error: object) -> None:
        failures = [failure for failure in self._ranks.gather(self._failure) if failure] if error[0] is None else []
        if self._socket is not None:
            self._socket.close()  # not before all have connected
        if failures:
            raise RuntimeError("; ".join(failures))


def meet(seat: Seat, rank_descriptor: int) -> Ranks | None:
    """Form the group of all writers; return None if the rank has closed its end of `rank_descriptor`.

    Raises:
        RanksLostError: another writer is gone.
    """
    ranks = Ranks()
    if seat.size > 1:
        meeting = _Meeting(seat)
        meeting.events.register(rank_descriptor, 0)  # which still reports that it was closed
        if not meeting.hold(rank_descriptor):
            return None
        ranks = Ranks()
    ranks.global_rank = seat.global_rank
    return ranks


class _Meeting:
    """The writer's side, run by the events of its connections."""

    def __init__(self, seat: Seat) -> None:
        self._seat = seat
        self._is_first = seat.rank == 0
        self.events = select.epoll()
        self._links: dict[int, tuple[socket.socket, str]] = {}  # with the name of who is at the other end
        self._unready = seat.size - 1  # writers that have not imported torch yet, as far as the first one knows
        self._wake = os.eventfd(0)
        self._progress: queue.Queue[str] = queue.Queue()
        self._port: queue.Queue[int] = queue.Queue()
        own = socket.socket(fileno=seat.descriptor)
        self._listener = own if self._is_first else None
        if self._is_first:
            self.events.register(own, select.EPOLLIN)
        else:
            self._add(own, "the first rank")
        self.events.register(self._wake, select.EPOLLIN)
        threading.Thread(target=self._join, daemon=True).start()

    def hold(self, rank_descriptor: int) -> bool:
        """Return True once the group is formed, False when the rank is gone."""
        is_imported = False
        while True:
            for descriptor, _ in self.events.poll():
                if descriptor == rank_descriptor:
                    return False
                if descriptor == self._wake:
                    os.eventfd_read(self._wake)
                    if (news := self._progress.get()) == "joined":
                        for link, _ in self._links.values():
                            link.detach()  # open until this process ends: the other may still be joining
                        return True
                    if news != "imported":
                        self._lost(news)
                    is_imported = True
                    if not self._is_first:
                        self._send("ready")
                elif descriptor in self._links:
                    self._receive(*self._links[descriptor])
                elif self._listener is not None:
                    self._accept(self._listener)
                if self._is_first and is_imported and self._unready == 0:
                    self._unready = -1
                    self._port.put(0)

    def _receive(self, link: socket.socket, name: str) -> None:
        try:
            lines = link.recv(4096).decode().splitlines()
        except OSError:
            lines = []
        for line in lines or [f"the writer process of {name} is gone"]:
            if line == "ready":
                self._unready -= 1
            elif line.startswith("port "):
                self._port.put(int(line.removeprefix("port ")))
            else:
                self._lost(line)

    def _lost(self, reason: str) -> None:
        if self._is_first:
            self._send(reason)
        raise RanksLostError(reason)

    def _accept(self, listener: socket.socket) -> None:
        link, _ = listener.accept()
        link.settimeout(_HELLO_SECONDS)
        try:
            token, rank = _HELLO.unpack(link.recv(_HELLO.size, socket.MSG_WAITALL))
        except (OSError, struct.error):
            token, rank = b"", 0
        if token.hex() != self._seat.token:
            link.close()  # a stranger
            return
        link.settimeout(None)
        _notice_dead_hosts(link)
        self._add(link, f"rank {rank}")

    def _add(self, link: socket.socket, name: str) -> None:
        self._links[link.fileno()] = link, name
        self.events.register(link, select.EPOLLIN | select.EPOLLRDHUP)

    def _send(self, text: str) -> None:
        for link, _ in self._links.values():
            with suppress(OSError):  # its end shows as an event
                link.sendall(f"{text}\n".encode())

    def _join(self) -> None:
        """Import torch and, when all writers have, form the group; runs in a thread."""
        try:
            import torch.distributed as dist

            self._tell("imported")
            port, seat = self._port.get(), self._seat
            timeout = timedelta(minutes=1)  # all are ready
            store = dist.TCPStore(seat.host, port, is_master=self._is_first, timeout=timeout, wait_for_workers=False)
            if self._is_first:
                self._send(f"port {store.port}")
            dist.init_process_group("gloo", store=store, rank=seat.rank, world_size=seat.size)
            self._tell("joined")
        except Exception as error:  # noqa: BLE001 - told to the rank, whatever it is
            self._tell(f"the writer processes cannot form a group: {str(error).partition(chr(10))[0]}")

    def _tell(self, news: str) -> None:
        self._progress.put(news)
        os.eventfd_write(self._wake, 1)


def _notice_dead_hosts(link: socket.socket) -> None:
    """Have the kernel close `link` within half a minute after the other host has lost power or network."""
    link.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in ((socket.TCP_KEEPIDLE, 10), (socket.TCP_KEEPINTVL, 5), (socket.TCP_KEEPCNT, 4)):
        link.setsockopt(socket.IPPROTO_TCP, option, value)
