"""Saving beside the training: a rank waits only while its tensors are copied, and a process of its own writes them."""

import os
import socket
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self

from mbridge_ckpt.background.pending_save import Snapshot, SnapshotSave
from mbridge_ckpt.background.shared_memory import Arena
from mbridge_ckpt.background.writer import Place, WriterProcess
from mbridge_ckpt.errors import SaveError, SaverBusyError
from mbridge_ckpt.store.layout import Layout, step_directory
from mbridge_ckpt.store.ranks import Ranks

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class AsyncSaver:
    """Saves in the background, one at a time; make one at the start of a run and close it at the end.

        with AsyncSaver() as saver:                                   # on every rank
            for step in range(steps):
                train()
                saver.check()                                         # a failed save raises here
                if step % 100 == 0:
                    with saver.begin_save(directory, step=step, layout=layout) as save:
                        save.write_torch(path, {"model": model.state_dict()})
                        save.commit()                                 # the model may change from here on

    A process beside each rank does what `begin_save` does, and promises the same. Host memory for one copy of all that
    a rank saves is taken at the first save and kept. Whatever ends a writer, the rank raises SaveError at its next
    `check`, `wait`, `begin_save` or `close`, once; so do the other ranks, whose writers lose it.

    Args:
        when_busy: what `begin_save` does while the last save is still being written: "wait" for it, or "refuse" with
            SaveError. The ranks agree on which it is.
        group: as for `begin_save`; the constructor and `begin_save` are collective over it.
    """

    def __init__(self, *, when_busy: Literal["wait", "refuse"] = "wait", group: "ProcessGroup | None" = None) -> None:
        self._when_busy = when_busy
        self._ranks = Ranks(group)
        self._arena = Arena()
        self._store, host, port = _open_store(self._ranks)
        place = Place(
            rank=self._ranks.rank,
            size=self._ranks.size,
            global_rank=self._ranks.global_rank,
            host=host,
            port=port,
        )
        self._writer: WriterProcess | None = WriterProcess(self._arena.descriptor, place)
        self._running: Path | None = None  # what the writer was given and has not answered for
        self._committed: Path | None = None  # answered for, and not yet told to the caller
        self._failure: str | None = None  # likewise
        self._dead: str | None = None  # why this saver can do nothing more

    @property
    def busy(self) -> bool:
        """Whether a save is being written, as far as `check` or `wait` know."""
        return self._running is not None

    @property
    def copied_bytes(self) -> int:
        """Host memory that this rank's copy takes, between saves too."""
        return self._arena.taken

    @property
    def process_id(self) -> int | None:
        """Of the writer process; None once closed."""
        return self._writer.process_id if self._writer is not None else None

    def begin_save(
        self,
        directory: str | Path,
        *,
        step: int,
        layout: Layout,
        existing: Literal["replace", "refuse"] = "replace",
    ) -> SnapshotSave:
        """Begin a save, with the arguments of the function `begin_save`; collective.

        Raises SaveError on every rank: a save before this one failed on some rank and that was not raised there yet,
        or a writer is gone; its subclass SaverBusyError: the last save is still running under `when_busy="refuse"`.
        Faults of the directory show later.
        """
        if self._writer is None:
            raise RuntimeError("the AsyncSaver is closed")
        self._receive(wait=self._when_busy == "wait")
        states = self._ranks.gather((self._failure or self._dead, self._running))
        self._failure = None
        final = Path(directory) / step_directory(step)
        if failures := [failure for failure, _ in states if failure is not None]:
            raise SaveError(f"{final} was not begun: {'; '.join(dict.fromkeys(failures))}")
        if running := [path for _, path in states if path is not None]:
            raise SaverBusyError(
                f"{final} was not begun: {running[0]} is still being written and when_busy is 'refuse'; save less"
                " often, or wait() first"
            )
        # The working directory of the writer is that of this process when it started, not now.
        snapshot = Snapshot(directory=Path(directory).absolute(), step=step, layout=layout, existing=existing)
        return SnapshotSave(snapshot, self._arena, self._ranks, self._hand_over)

    def check(self) -> Path | None:
        """The directory of a save that was committed since the last call, if any; takes microseconds, not collective.

        Call it once a training step. Raises SaveError, once, if the save failed or the writer process is gone.
        """
        self._receive(wait=False)
        return self._report()

    def wait(self) -> Path | None:
        """As `check`, after the running save has ended."""
        self._receive(wait=True)
        return self._report()

    def close(self) -> None:
        """Wait for the running save, end the writer process and give the memory back. Raises as `check` does."""
        if self._writer is None:
            return
        self._receive(wait=True)
        self._writer.close()
        self._writer = None
        self._arena.close()
        self._report()

    def _hand_over(self, snapshot: Snapshot) -> None:
        assert self._writer is not None
        self._writer.send(self._arena.store(snapshot.to_json()))
        self._running = snapshot.directory / step_directory(snapshot.step)

    def _receive(self, *, wait: bool) -> None:
        """Take in what the writer has to say, waiting for it only if there is something running."""
        if self._writer is None or self._dead is not None:
            return
        try:
            answer = self._writer.receive(wait=wait and self._running is not None)
        except EOFError as error:
            doing = f"{self._running} was not saved" if self._running else "nothing was being saved"
            self._dead = f"rank {self._ranks.global_rank} ({socket.gethostname()}): {error}; make a new AsyncSaver"
            self._failure = self._failure or f"{doing}: {self._dead}; earlier checkpoints are untouched"
            self._running = None
            return
        if answer is not None:
            self._committed = self._running if answer.error is None else None
            self._failure = answer.error
            self._running = None
            if answer.lost:
                self._dead = "the writers of the ranks lost each other in an earlier save; make a new AsyncSaver"

    def _report(self) -> Path | None:
        failure, self._failure = self._failure, None
        if failure is not None:
            raise SaveError(failure)
        committed, self._committed = self._committed, None
        return committed

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            self.close()
        except SaveError as failure:
            if error is None:
                raise
            error.add_note(str(failure))


def _open_store(ranks: Ranks) -> tuple[Any, str, int]:
    """The TCP store in which the writers meet, on the first rank, and its address, on every rank."""
    if ranks.size == 1:
        return None, "", 0
    from torch.distributed import TCPStore

    hosts = set(ranks.gather(socket.gethostname()))
    store, address = None, ("", 0)
    if ranks.rank == 0:
        # Over several hosts, rank 0 of the job is known by an address that the others are sure to reach.
        known = os.environ.get("MASTER_ADDR", "") if ranks.global_rank == 0 else ""
        host = "127.0.0.1" if len(hosts) == 1 else known or socket.getfqdn()
        store = TCPStore(host, 0, is_master=True, wait_for_workers=False)
        address = host, store.port
    host, port = ranks.from_first(address)
    return store, host, port
