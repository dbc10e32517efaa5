"""A save that is copied into memory now and written by another process later."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from mbridge_ckpt.background.staging import StagingBuffer
from mbridge_ckpt.errors import CheckpointError
from mbridge_ckpt.formats.tensors import TensorRecord
from mbridge_ckpt.manifest.layout import Layout, step_directory
from mbridge_ckpt.manifest.placement import ParameterPlacement
from mbridge_ckpt.store.checkpoint_writer import CheckpointWriter, SaveStream
from mbridge_ckpt.store.ranks import Ranks
from mbridge_ckpt.store.transaction import Save

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredFile:
    """A file of the checkpoint: its bytes are those of `extents` in the staging buffer, one after the other."""

    path: str
    extents: tuple[slice, ...]
    tensors: tuple[TensorRecord, ...]
    placements: tuple[ParameterPlacement, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class PendingSave:
    """One rank's part of a save. `failure` says why it contributes nothing, so that the other ranks learn of it."""

    directory: Path
    step: int
    layout: Layout
    existing: Literal["replace", "refuse"]
    files: tuple[StoredFile, ...] = ()
    metadata: dict[str, Any] | None = None
    writer: dict[str, str] | None = None
    failure: str | None = None

    def write(self, staging: memoryview, ranks: Ranks) -> Path:
        """Write the save with `Save`; collective over the writer processes of all ranks."""
        with Save(self.directory, step=self.step, layout=self.layout, ranks=ranks, existing=self.existing) as save:
            if self.failure is not None:
                raise CheckpointError(self.failure)
            for file in self.files:
                with save.stream(file.path) as stream:
                    stream.tensors, stream.placements = file.tensors, file.placements
                    for extent in file.extents:
                        stream.write(staging[extent])
            return save.commit(self.metadata, writer=self.writer)


class SnapshotSave(CheckpointWriter):
    """A save that copies what it is given and is written after `commit` has returned; made by `AsyncSaver.begin_save`.

    The directory that `commit` returns does not exist yet: `AsyncSaver.check` and `wait` tell when it does, or why it
    never will. An exception in the block reaches the other ranks there, as a SaveError.
    """

    def __init__(
        self, pending: PendingSave, staging: StagingBuffer, ranks: Ranks, hand_over: Callable[[PendingSave], None]
    ) -> None:
        super().__init__(pending.step, pending.layout, ranks)
        self._pending = pending
        self._staging = staging
        self._hand_over = hand_over
        self._files: dict[str, StoredFile] = {}
        staging.reset()

    @contextmanager
    def stream(self, path: str) -> Iterator[SaveStream]:
        """Open a new file in memory, to be written piece by piece."""
        self._claim(path)
        extents: list[slice] = []

        def write(data: bytes | memoryview) -> int:
            extents.append(self._staging.store(data))
            return memoryview(data).nbytes

        stream = SaveStream(write)
        yield stream
        self._files[path] = StoredFile(
            path=path, extents=tuple(extents), tensors=stream.tensors, placements=stream.placements
        )

    def rename(self, old: str, new: str) -> None:
        """Change the name alone: nothing is on the disk yet."""
        self._claim(new)
        self._files[new] = replace(self._files.pop(old), path=new)
        self._names.discard(old)

    def host_copy(self, tensor: "Tensor") -> "Tensor":
        """Copy `tensor` into the staging buffer, where a stream takes it without copying it again."""
        return self._staging.store_tensor(tensor)

    def commit(self, metadata: dict[str, Any] | None = None, *, writer: dict[str, str] | None = None) -> Path:
        """Hand the copy over to the writer; returns the directory that it will be in.

        For the arguments see `CheckpointWriter.commit`; TypeError or ValueError if they are not JSON.
        """
        # Plain JSON values: the writer process could not unpickle the program's own types.
        metadata, writer = json.loads(json.dumps([metadata, writer], allow_nan=False))
        self._staging.synchronize()
        files = tuple(self._files.values())
        self._hand_over(replace(self._pending, files=files, metadata=metadata, writer=writer))
        self._open = False
        return self._pending.directory / step_directory(self.step)

    def __exit__(self, _kind: object, error: BaseException | None, _traceback: object) -> None:
        if not self._open:
            return
        self._open = False
        reason = f"{type(error).__name__}: {error}" if error is not None else "the save's block ended without commit()"
        self._staging.synchronize()
        self._staging.reset()
        self._hand_over(replace(self._pending, failure=reason))
        if error is None:
            raise CheckpointError(f"{self._pending.directory}: {reason}")
