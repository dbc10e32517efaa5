"""A save that is copied into memory now and written by another process later."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self

from mbridge_ckpt.background.shared_memory import Arena, ArenaReader, Extent
from mbridge_ckpt.errors import CheckpointError
from mbridge_ckpt.reshard.placement import ParameterPlacement
from mbridge_ckpt.store.layout import Layout, step_directory
from mbridge_ckpt.store.manifest import TensorRecord
from mbridge_ckpt.store.ranks import Ranks
from mbridge_ckpt.store.transaction import Save
from mbridge_ckpt.store.writing import CheckpointWriter, SaveStream

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredFile:
    """A file of the checkpoint: its bytes are those of `extents` in the arena, one after the other."""

    path: str
    extents: tuple[Extent, ...]
    tensors: tuple[TensorRecord, ...]
    placements: tuple[ParameterPlacement, ...]

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Self:
        return cls(
            path=value["path"],
            extents=tuple((offset, length) for offset, length in value["extents"]),
            tensors=tuple(TensorRecord(name, tuple(shape), dtype) for name, shape, dtype in value["tensors"]),
            placements=tuple(ParameterPlacement.from_json(item) for item in value["placements"]),
        )

    def to_json(self) -> dict[str, Any]:
        return {
            "path": self.path,
            "extents": self.extents,
            "tensors": [[tensor.name, tensor.shape, tensor.dtype] for tensor in self.tensors],
            "placements": [placement.to_json() for placement in self.placements],
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class Snapshot:
    """All that one rank gives to a save. `failure` says why it gives nothing, so that the other ranks learn of it."""

    directory: Path
    step: int
    layout: Layout
    existing: Literal["replace", "refuse"]
    files: tuple[StoredFile, ...] = ()
    metadata: dict[str, Any] | None = None
    writer: dict[str, str] | None = None
    failure: str | None = None

    @classmethod
    def from_json(cls, text: bytes | memoryview) -> Self:
        value = json.loads(bytes(text))
        value["directory"] = Path(value["directory"])
        value["layout"] = Layout.from_json(value["layout"])
        value["files"] = tuple(StoredFile.from_json(item) for item in value["files"])
        return cls(**value)

    def to_json(self) -> bytes:
        """Raises TypeError or ValueError when the metadata is not JSON."""
        value = {name: getattr(self, name) for name in (field.name for field in fields(self))}
        value["directory"] = str(self.directory)
        value["layout"] = self.layout.to_json()
        value["files"] = [file.to_json() for file in self.files]
        return json.dumps(value, allow_nan=False).encode()

    def write(self, arena: ArenaReader, ranks: Ranks) -> Path:
        """Save for good, with `Save`; collective over the writer processes of all ranks."""
        with Save(self.directory, step=self.step, layout=self.layout, ranks=ranks, existing=self.existing) as save:
            if self.failure is not None:
                raise CheckpointError(self.failure)
            for file in self.files:
                with save.stream(file.path) as stream:
                    stream.tensors, stream.placements = file.tensors, file.placements
                    for extent in file.extents:
                        stream.write(arena[extent])
            return save.commit(self.metadata, writer=self.writer)


class SnapshotSave(CheckpointWriter):
    """A save whose content is copied when it is given and written after `commit` returned; of `AsyncSaver.begin_save`.

    The directory that `commit` returns is not there yet: `AsyncSaver.check` and `wait` tell when it is, or why it never
    will be. An exception in the block reaches the other ranks as a SaveError there.
    """

    def __init__(self, snapshot: Snapshot, arena: Arena, ranks: Ranks, hand_over: Callable[[Snapshot], None]) -> None:
        super().__init__(snapshot.step, snapshot.layout, ranks)
        self._snapshot = snapshot
        self._arena = arena
        self._hand_over = hand_over
        self._files: dict[str, StoredFile] = {}
        arena.reset()

    @contextmanager
    def stream(self, path: str) -> Iterator[SaveStream]:
        """A new file to write piece by piece, into memory."""
        self._claim(path)
        stream = _ArenaStream(self._arena)
        yield stream
        extents = tuple(stream.extents)
        self._files[path] = StoredFile(path=path, extents=extents, tensors=stream.tensors, placements=stream.placements)

    def rename(self, old: str, new: str) -> None:
        """Only a name: nothing is on the disk yet."""
        self._claim(new)
        self._files[new] = replace(self._files.pop(old), path=new)
        self._names.discard(old)

    def to_host(self, tensor: "Tensor") -> "Tensor":
        """A copy in the arena."""
        return self._arena.store_tensor(tensor)

    def host_copy(self, tensor: "Tensor") -> "Tensor":
        """A copy in the arena, which a stream then takes without copying it again."""
        return self._arena.store_tensor(tensor)

    def commit(self, metadata: dict[str, Any] | None = None, *, writer: dict[str, str] | None = None) -> Path:
        """Hand the copy over to be written; returns the directory that it will be in.

        For the arguments see `CheckpointWriter.commit`; TypeError or ValueError if they are not JSON.
        """
        files = tuple(self._files.values())
        self._arena.synchronize()
        self._hand_over(replace(self._snapshot, files=files, metadata=metadata, writer=writer))
        self._open = False
        return self._snapshot.directory / step_directory(self.step)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if not self._open:
            return
        self._open = False
        reason = f"{type(error).__name__}: {error}" if error is not None else "the save's block ended without commit()"
        self._arena.synchronize()
        self._arena.reset()
        self._hand_over(replace(self._snapshot, failure=reason))
        if error is None:
            raise CheckpointError(f"{self._snapshot.directory}: {reason}")


class _ArenaStream(SaveStream):
    def __init__(self, arena: Arena) -> None:
        super().__init__()
        self._arena = arena
        self.extents: list[Extent] = []

    def write(self, data: bytes | memoryview, /) -> int:
        extent = self._arena.store(data)
        self.extents.append(extent)
        return extent[1]
