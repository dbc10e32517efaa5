"""Save on all ranks or on none: every rank writes into one temporary directory, and one rename makes it a checkpoint.

Each step is on the disk before the next begins: files of every rank (fsync), agreement of all ranks, manifest,
directories, rename to `global_step_N`, `latest`. A process that dies at any point leaves either the whole new
checkpoint or none of it, and the old ones unchanged.
"""

import json
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from fcntl import LOCK_EX, LOCK_NB, flock
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from mbridge_ckpt.errors import CheckpointError, RanksLostError, SaveError
from mbridge_ckpt.files.durable import fsync_path
from mbridge_ckpt.files.hashing import HashingFile, hash_file
from mbridge_ckpt.files.paths import files_below, inside
from mbridge_ckpt.formats.torch_zip import host_tensor
from mbridge_ckpt.manifest.layout import (
    MANIFEST_FILE,
    TRACKER_FILE,
    Layout,
    iteration_directory,
    refuse_inside_checkpoint,
    step_directory,
)
from mbridge_ckpt.manifest.manifest import FileRecord, Manifest
from mbridge_ckpt.store.checkpoint_writer import CheckpointWriter, SaveStream
from mbridge_ckpt.store.publish import WRITER_FILE, commit_time, publish, temporary_directory, writer_versions
from mbridge_ckpt.store.ranks import Ranks

if TYPE_CHECKING:
    from torch import Tensor
    from torch.distributed import ProcessGroup


def begin_save(
    directory: str | Path,
    *,
    step: int,
    layout: Layout,
    group: "ProcessGroup | None" = None,
    existing: Literal["replace", "refuse"] = "replace",
) -> "Save":
    """Begin a save of `global_step_<step>` in the checkpoints directory `directory`; collective over `group`.

    `group` should be a separate gloo group; None is the default group, or this process alone without one.
    `existing` says what happens to a committed checkpoint of the same step: "replace" keeps it until the new one is
    complete and then exchanges the two, "refuse" raises here, before anything is written.

    Raises SaveError on every rank if one rank cannot begin.
    """
    return Save(Path(directory), step=step, layout=layout, ranks=Ranks(group), existing=existing)


class Save(CheckpointWriter):
    """A save that is on the disk when `commit` returns, made by `begin_save`.

    An I/O error (full disk, file-size limit) in a `write_*` method does not raise there: this rank goes on, so that
    collectives inside the block stay matched; its later writes are dropped, and `commit` raises on every rank. An
    exception in the block leaves it at once (an OSError as SaveError), and the other ranks raise SaveError at `commit`.
    """

    def __init__(
        self, directory: Path, *, step: int, layout: Layout, ranks: Ranks, existing: Literal["replace", "refuse"]
    ) -> None:
        super().__init__(step, layout, ranks)
        self._final = directory / step_directory(step)
        self._records: dict[str, FileRecord] = {}
        self._external: list[str] = []
        self._failure: str | None = None  # why this rank cannot go on, for all ranks to read
        self._lock = -1
        temporary = temporary_directory(directory, step)
        if self._ranks.rank == 0:
            try:
                refuse_inside_checkpoint(directory)
                directory.mkdir(parents=True, exist_ok=True)
                if existing == "refuse" and os.path.lexists(self._final):
                    raise SaveError(f"{self._final} exists; delete it, or save with existing='replace'")
                temporary.mkdir()
                self._lock = _lock_writer(temporary)
            except (OSError, CheckpointError) as error:
                self._note(_text(error))
        self.path, begun = self._ranks.from_first((temporary, self._failure is None))
        if begun and not self.path.is_dir():
            self._note(f"does not see {self.path}, which the first rank made; all ranks need one shared file system")
        self._agree(None)

    @contextmanager
    def stream(self, path: str) -> Iterator[SaveStream]:
        """Open a new file to be written piece by piece: hashed on the way, and on the disk when the block ends."""
        target = self._new_file(path)
        file: HashingFile | None = None
        if self._failure is None:
            try:
                target.parent.mkdir(parents=True, exist_ok=True)
                file = HashingFile(target)
            except OSError as error:
                self._note_writing(path, error)
        # After a failure of this rank, what is written is dropped.
        stream = SaveStream(file.write if file is not None else lambda data: memoryview(data).nbytes)
        try:
            with file or nullcontext():
                yield stream
                if file is not None:
                    digest = file.close()
                    self._records[path] = FileRecord(
                        path=path,
                        bytes=file.bytes,
                        xxh3_128=digest,
                        tensors=stream.tensors,
                        placements=stream.placements,
                    )
        except OSError as error:
            self._note_writing(path, error)

    def file(self, path: str) -> Path:
        """Return the absolute path for a file that another library writes; `commit` reads it back for its checksum.

        `commit` does so for any other file below `self.path` too, but on the first rank alone. Prefer the other
        methods, which hash the bytes as they are written and not as the disk returns them.
        """
        target = self._new_file(path)
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            self._note_writing(path, error)
        self._external.append(path)
        return target

    def rename(self, old: str, new: str) -> None:
        """Rename with one system call; the content is not written again."""
        target = self._new_file(new)
        if self._failure is None:
            try:
                os.rename(self.path / old, target)
                self._records[new] = replace(self._records.pop(old), path=new)
                self._names.discard(old)
            except OSError as error:
                self._note_writing(new, error)

    def to_host(self, tensor: "Tensor") -> "Tensor":
        """Return `tensor` itself where possible: it is written before the caller goes on."""
        return host_tensor(tensor)

    def commit(self, metadata: dict[str, Any] | None = None, *, writer: dict[str, str] | None = None) -> Path:
        """Make the save a checkpoint and return its directory, on every rank; collective.

        Raises SaveError on every rank, naming the ranks that failed and why; then no checkpoint was made and earlier
        ones are untouched. For the arguments see `CheckpointWriter.commit`.
        """
        for path in self._external:
            try:
                self._records[path] = _read_back(self.path, path)
            except (OSError, CheckpointError) as error:
                self._note(f"cannot read back {self._final / path}: {_text(error)}")
        self._open = False
        records = [record for part in self._agree(list(self._records.values())) for record in part]
        if self._ranks.rank == 0:
            try:
                self._publish(records, metadata or {}, writer or {})
            except (OSError, CheckpointError, TypeError, ValueError) as error:
                self._note(f"cannot commit {self._final}: {_text(error)}")
        self._agree(None, if_lost="may or may not have been saved")
        self._release()
        return self._final

    def _publish(self, records: list[FileRecord], metadata: dict[str, Any], writer: dict[str, str]) -> None:
        if any(record.path.startswith(iteration_directory(self.step) + "/") for record in records):
            records.append(_write(self.path, TRACKER_FILE, str(self.step).encode()))
        # Files that were written below `path` by other means belong to the checkpoint too.
        for path in sorted(set(files_below(self.path)) - {record.path for record in records} - {WRITER_FILE}):
            records.append(_read_back(self.path, path))
        manifest = Manifest(
            step=self.step,
            created=commit_time(self._final.parent),
            layout=self.layout,
            writer=writer_versions() | writer,
            metadata=metadata,
            files=tuple(sorted(records, key=lambda record: record.path)),
        )
        _write(self.path, MANIFEST_FILE, manifest.to_bytes())
        (self.path / WRITER_FILE).unlink(missing_ok=True)
        publish(self.path, self.step)

    def _new_file(self, path: str) -> Path:
        self._claim(path)
        return inside(self.path, path)

    def _note(self, reason: str) -> None:
        if self._failure is None:
            self._failure = f"rank {self._ranks.global_rank} ({socket.gethostname()}): {reason}"

    def _note_writing(self, path: str, error: OSError) -> None:
        where = self._final / path if path else error.filename or self._final
        self._note(f"cannot write {where}: {error.strerror or error}")

    def _agree[T](self, value: T, *, if_lost: str = "was not saved") -> list[T]:
        """Exchange failures and `value`; with any failure, clean up and raise the same SaveError on every rank."""
        try:
            answers = self._ranks.gather((self._failure, value))
        except RuntimeError as error:
            raise RanksLostError(
                f"{self._final} {if_lost}: a rank is gone or out of step ({str(error).splitlines()[0]}); earlier"
                f" checkpoints are untouched, and `mbridge-ckpt prune` removes {self.path.name} if it is there"
            ) from error
        failures = [failure for failure, _ in answers if failure is not None]
        if failures:
            self._abandon()
            raise SaveError(f"{self._final} was not saved: {'; '.join(failures)}; earlier checkpoints are untouched")
        return [value for _, value in answers]

    def _abandon(self) -> None:
        # Reached only after all ranks met in `_agree`, so none of them is still writing.
        self._open = False
        if self._ranks.rank == 0:
            shutil.rmtree(self.path, ignore_errors=True)
        self._release()

    def _release(self) -> None:
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def __exit__(self, _kind: object, error: BaseException | None, _traceback: object) -> None:
        if not self._open:
            return
        if error is None:
            self._note("the save's block ended without commit()")
        elif isinstance(error, OSError):
            # From a writer of the caller's, to a path of `file`; most such errors do not say which.
            self._note_writing(self._external[-1] if self._external and not error.filename else "", error)
        elif isinstance(error, Exception):
            self._note(_text(error))
        elif self._ranks.size == 1:
            self._abandon()
            return
        else:  # Ctrl-C and exits must not wait for ranks that may never come; `prune` removes what is left
            self._open = False
            self._release()
            return
        try:
            self._agree([])
        except SaveError as failure:
            if error is None or isinstance(error, OSError):
                raise
            error.add_note(str(failure))


def _lock_writer(temporary: Path) -> int:
    """Leave a mark that stays locked until this process ends, however it ends: `prune` tells dead from live by it."""
    descriptor = os.open(temporary / WRITER_FILE, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        os.write(descriptor, json.dumps({"host": socket.gethostname(), "process": os.getpid()}).encode())
        flock(descriptor, LOCK_EX | LOCK_NB)
    except OSError:
        pass  # a file system without locks, or a full one, which the first real write will report
    return descriptor


def _write(root: Path, path: str, data: bytes) -> FileRecord:
    with HashingFile(root / path) as file:
        file.write(data)
        return FileRecord(path=path, bytes=file.bytes, xxh3_128=file.close())


def _read_back(root: Path, path: str) -> FileRecord:
    target = inside(root, path)
    fsync_path(target)
    size, digest = hash_file(target)
    return FileRecord(path=path, bytes=size, xxh3_128=digest)


def _text(error: BaseException) -> str:
    message = str(error) or type(error).__name__
    return message if isinstance(error, (CheckpointError, OSError)) else f"{type(error).__name__}: {message}"
