"""Save while training goes on: a rank waits only for the copy of its tensors, which a process beside it writes."""

import os
import socket
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Self

from mbridge_ckpt.background.pending_save import PendingSave, SnapshotSave
from mbridge_ckpt.background.staging import StagingBuffer
from mbridge_ckpt.background.writer_process import Meeting, Outcome, WriterProcess
from mbridge_ckpt.errors import SaveError, SaverBusyError
from mbridge_ckpt.manifest.layout import Layout, step_directory
from mbridge_ckpt.store.ranks import Ranks

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


_NO_MORE = "no save can follow in this run; start it again from its last checkpoint"


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
    a rank saves is allocated at the first save and kept. Whatever ends a writer, its rank raises SaveError once, at its
    next `check`, `wait`, `begin_save` or `close`; so do the other ranks, whose writers lose it. A writer ends with its
    rank at once, and with the thread that made the AsyncSaver, so make it in one that lives as long.

    Args:
        when_busy: what `begin_save` does while the last save is still being written: "wait" for it, or "refuse" with
            SaveError. The ranks agree on which it is.
        group: as for `begin_save`, which is collective over it. The first save of several ranks also waits until their
            writers have started and found each other.
    """

    def __init__(self, *, when_busy: Literal["wait", "refuse"] = "wait", group: "ProcessGroup | None" = None) -> None:
        self._when_busy = when_busy
        self._ranks = Ranks(group)
        self._staging = StagingBuffer()
        self._writer: WriterProcess | None = WriterProcess(self._staging.descriptor, self._ranks)
        self._has_met = self._ranks.size == 1  # whether the writers of all ranks have formed a group
        self._running: Path | None = None  # what the writer was given and has not reported on
        self._committed: Path | None = None  # reported, and not yet told to the caller
        self._failure: str | None = None  # likewise
        self._dead: str | None = None  # why this saver can do nothing more

    @property
    def busy(self) -> bool:
        """Whether a save is being written, as far as `check` or `wait` know."""
        return self._running is not None

    @property
    def process_id(self) -> int | None:
        """Process id of the writer; None once closed."""
        return self._writer.process_id if self._writer is not None else None

    def begin_save(
        self, directory: str | Path, *, step: int, layout: Layout, existing: Literal["replace", "refuse"] = "replace"
    ) -> SnapshotSave:
        """Begin a save, with the arguments of the function `begin_save`; collective.

        Raises SaveError on every rank if an earlier save failed on some rank and that was not raised there yet, or if a
        writer is gone; its subclass SaverBusyError if the last save is still running under `when_busy="refuse"`. Faults
        of the directory show later.
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
        if not self._has_met:
            self._meet(final)
        # The working directory of the writer is that of this process when it started, not now.
        pending = PendingSave(directory=Path(directory).absolute(), step=step, layout=layout, existing=existing)
        return SnapshotSave(pending, self._staging, self._ranks, self._hand_over)

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
        if not self._has_met:
            self._writer.kill()  # it has nothing to write, and may be waiting for those of other ranks
        self._writer.close()
        self._writer = None
        self._staging.close()
        self._report()

    def _hand_over(self, pending: PendingSave) -> None:
        assert self._writer is not None
        self._writer.send(pending)
        self._running = pending.directory / step_directory(pending.step)

    def _meet(self, final: Path) -> None:
        """Have the writers of all ranks form a group; collective. Raises SaveError on every rank if one is gone."""
        on_one_host = len(set(self._ranks.gather(socket.gethostname()))) == 1
        # Over several hosts, rank 0 of the job is known by an address that the others are sure to reach.
        known = os.environ.get("MASTER_ADDR", "") if self._ranks.global_rank == 0 else ""
        host = self._ranks.from_first("127.0.0.1" if on_one_host else known or socket.getfqdn())
        port = self._ask_all(Meeting(host, 0), final)[0]
        self._ask_all(Meeting(host, port), final)
        self._has_met = True

    def _ask_all(self, request: Meeting, final: Path) -> list[int]:
        """Return the ports that the writers of all ranks answer; raises SaveError as soon as one is gone or fails."""
        assert self._writer is not None
        self._writer.send(request)
        answer: Outcome | None = None
        while True:
            try:
                answer = answer or self._writer.receive(seconds=0.1)
            except EOFError as error:
                answer = Outcome(str(error))
            failure = None
            if answer is not None and answer.error is not None:
                failure = self._named(answer.error.partition("\n")[0])  # torch adds a stack
            states = self._ranks.gather((failure, answer.port if answer is not None else None))
            if failures := [failure for failure, _ in states if failure is not None]:
                self._dead = "; ".join(failures)
                raise SaveError(f"{final} was not begun: {self._dead}; earlier checkpoints are untouched")
            ports = [port for _, port in states if port is not None]
            if len(ports) == len(states):
                return ports

    def _named(self, reason: str) -> str:
        return f"rank {self._ranks.global_rank} ({socket.gethostname()}): {reason}; {_NO_MORE}"

    def _receive(self, *, wait: bool) -> None:
        """Note what the writer reports, waiting for it only if a save is running."""
        if self._writer is None or self._dead is not None:
            return
        try:
            outcome = self._writer.receive(None if wait and self._running is not None else 0)
        except EOFError as error:
            doing = f"{self._running} was not saved" if self._running else "nothing was being saved"
            self._dead = self._named(str(error))
            self._failure = self._failure or f"{doing}: {self._dead}; earlier checkpoints are untouched"
            self._running = None
            return
        if outcome is not None:
            self._committed = self._running if outcome.error is None else None
            self._failure = outcome.error
            self._running = None
            if outcome.lost:
                self._dead = f"the writers of the ranks lost each other in an earlier save; {_NO_MORE}"

    def _report(self) -> Path | None:
        failure, self._failure = self._failure, None
        if failure is not None:
            raise SaveError(failure)
        committed, self._committed = self._committed, None
        return committed

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _kind: object, error: BaseException | None, _traceback: object) -> None:
        try:
            self.close()
        except SaveError as failure:
            if error is None:
                raise
            error.add_note(str(failure))
