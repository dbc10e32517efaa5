"""The interface of a save in progress, which writes at once (`Save`) or in the background (`SnapshotSave`)."""

import json
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from mbridge_ckpt.errors import CheckpointError
from mbridge_ckpt.files.hashing import READ_BLOCK
from mbridge_ckpt.formats.tensors import TensorRecord
from mbridge_ckpt.formats.torch_zip import write_torch_file
from mbridge_ckpt.manifest.layout import MANIFEST_FILE, TRACKER_FILE, Layout, rank_state_file
from mbridge_ckpt.manifest.placement import ParameterPlacement
from mbridge_ckpt.store.publish import WRITER_FILE
from mbridge_ckpt.store.rank_state import RANK_STATE_VERSION
from mbridge_ckpt.store.ranks import Ranks

if TYPE_CHECKING:
    from torch import Tensor

_RESERVED = (MANIFEST_FILE, WRITER_FILE, TRACKER_FILE)


@dataclass(slots=True)
class SaveStream:
    """One file being written. Set `tensors` and `placements` to record them in the manifest.

    `write` writes all of its argument and returns the number of bytes. An OSError ends the `with` block of the stream.
    """

    write: Callable[[bytes | memoryview], int]
    tensors: tuple[TensorRecord, ...] = ()
    placements: tuple[ParameterPlacement, ...] = ()


class FileSink(ABC):
    """A place for new files, which are written one at a time."""

    @abstractmethod
    def stream(self, path: str) -> AbstractContextManager[SaveStream]:
        """Open a new file to be written piece by piece."""

    @abstractmethod
    def rename(self, old: str, new: str) -> None:
        """Rename a file that was written here by this process."""

    def host_copy(self, tensor: "Tensor") -> "Tensor":
        """Return a contiguous copy of `tensor` on the CPU, which later changes of `tensor` do not reach."""
        return tensor.detach().to("cpu", copy=True).contiguous()

    def write_bytes(self, path: str, data: bytes) -> None:
        """Write `data` unchanged."""
        with self.stream(path) as stream:
            stream.write(data)

    def write_json(self, path: str, value: Any) -> None:
        """Write `value` as JSON text; raises ValueError for NaN and infinities, TypeError for types that JSON lacks."""
        self.write_bytes(path, json.dumps(value, indent=2, allow_nan=False).encode() + b"\n")

    def copy(self, file: Path, path: str, tensors: tuple[TensorRecord, ...] = ()) -> None:
        """Write a copy of `file`, which holds `tensors`."""
        with file.open("rb") as reader, self.stream(path) as stream:
            stream.tensors = tensors
            shutil.copyfileobj(reader, stream, READ_BLOCK)


class CheckpointWriter(FileSink):
    """A save in progress. A context manager whose block ends with `commit`."""

    def __init__(self, step: int, layout: Layout, ranks: Ranks) -> None:
        self.step = step
        self.layout = layout
        self._ranks = ranks
        self._names: set[str] = set()
        self._open = True

    @property
    def is_first(self) -> bool:
        """Whether this is the first rank of the save, which writes what exists only once."""
        return self._ranks.rank == 0

    def write_torch(self, path: str, value: Any, *, placements: Sequence[ParameterPlacement] = ()) -> None:
        """torch.save `value` (see `write_torch_file` for what it may hold); `placements` describe its parameters."""
        with self.stream(path) as stream:
            stream.tensors = write_torch_file(stream, value, self.to_host)
            stream.placements = tuple(placements)

    def write_rank_state(self, state: dict[str, Any]) -> None:
        """Store what this rank needs to resume (random state, data position, loop); called once on each rank."""
        rank = self._ranks.global_rank
        value = {"version": RANK_STATE_VERSION, "rank": rank, "state": state}
        self.write_torch(rank_state_file(rank), value)

    def to_host(self, tensor: "Tensor") -> "Tensor":
        """Return `tensor` detached, contiguous and on the CPU, to be written to a stream before anything changes it."""
        return self.host_copy(tensor)

    @abstractmethod
    def commit(self, metadata: dict[str, Any] | None = None, *, writer: dict[str, str] | None = None) -> Path:
        """Make the save a checkpoint and return its directory.

        `metadata` is a JSON object (retention by metric reads `metadata["metrics"]`), `writer` versions to record
        beside our own; both are taken from the group's first rank.
        """

    def _claim(self, path: str) -> None:
        """Reserve the name of a new file; raises if it is not available."""
        if not self._open:
            raise RuntimeError(f"{path}: the save is over, nothing more can be written")
        if path in _RESERVED or path in self._names:
            raise CheckpointError(
                f"{path}: this name is reserved or was written before in the same save; choose another"
            )
        self._names.add(path)

    def __enter__(self) -> Self:
        return self
