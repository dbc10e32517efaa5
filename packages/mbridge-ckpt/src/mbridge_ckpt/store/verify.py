"""Compare a checkpoint on the disk with its manifest: quickly by sizes and headers, or in full by checksums."""

import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING

from mbridge_ckpt.errors import CheckpointError, CorruptCheckpointError, IncompleteCheckpointError
from mbridge_ckpt.files.hashing import hash_file
from mbridge_ckpt.files.paths import files_below, inside
from mbridge_ckpt.formats.safetensors import read_safetensors_header, read_safetensors_index
from mbridge_ckpt.formats.torch_reader import inspect_torch_file
from mbridge_ckpt.manifest.layout import HF_DIRECTORY, MANIFEST_FILE
from mbridge_ckpt.manifest.manifest import FileRecord, read_manifest
from mbridge_ckpt.store.ranks import Ranks

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_NAME = attrgetter("name")


@dataclass(frozen=True, slots=True)
class Fault:
    """A file that differs from what was committed. `needed_to_resume` is False for the HuggingFace export."""

    path: str
    message: str
    needed_to_resume: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class VerifyReport:
    """Outcome of `verify`. `contents` says whether checksums were compared; `notes` are remarks that are not faults."""

    path: Path
    step: int
    contents: bool
    files: int
    bytes: int
    faults: tuple[Fault, ...]
    notes: tuple[str, ...]

    @property
    def ok(self) -> bool:
        return not self.faults

    @property
    def resumable(self) -> bool:
        return not any(fault.needed_to_resume for fault in self.faults)


def verify(
    path: str | Path,
    *,
    contents: bool = True,
    only_needed_to_resume: bool = False,
    group: "ProcessGroup | None" = None,
    progress: Callable[[int], None] | None = None,
) -> VerifyReport:
    """Check every file of the checkpoint directory `path` against its manifest.

    `contents=False` compares sizes, headers and tensor lists, without reading tensors. In a distributed job every rank
    calls this; each checks a share of the files and all get the whole report. `progress` is called with the bytes of
    each file done. Raises CheckpointError if there is no readable manifest.
    """
    root = Path(path)
    ranks = Ranks(group)
    # One rank reads the manifest, so that all see the same one, or the same error.
    step, records, notes, error = ranks.from_first(_plan(root, only_needed_to_resume) if ranks.rank == 0 else None)
    if error is not None:
        raise error
    faults = []
    for record in _share(records, ranks.rank, ranks.size):
        try:
            check_file(root, record, contents=contents)
        except CheckpointError as error:
            faults.append(Fault(record.path, str(error), record.needed_to_resume))
        if progress is not None:
            progress(record.bytes)
    everywhere = [fault for part in ranks.gather(faults) for fault in part]
    return VerifyReport(
        path=root,
        step=step,
        contents=contents,
        files=len(records),
        bytes=sum(record.bytes for record in records),
        faults=tuple(sorted(everywhere, key=lambda fault: fault.path)),
        notes=notes,
    )


def require_whole(
    path: Path, *, only_needed_to_resume: bool = False, progress: Callable[[int], None] | None = None
) -> None:
    """Raise CorruptCheckpointError for the first file in which `verify` finds a fault."""
    report = verify(path, only_needed_to_resume=only_needed_to_resume, progress=progress)
    if report.faults:
        raise CorruptCheckpointError(report.faults[0].message)


def check_file(root: Path, record: FileRecord, *, contents: bool = True) -> Path:
    """Compare one file with its record and return its path. Errors (CheckpointError's classes) name the file.

    Sizes, headers and tensor lists always; with `contents` the checksum too. A matching checksum does not exclude that
    a file would run code when it is loaded.
    """
    path = inside(root, record.path)
    with _named_errors(path, record):
        _check_size(path, record)
        if contents:
            _check_digest(path, record, hash_file(path)[1])
        _check_header(path, record)
    return path


def load_checked[T](root: Path, record: FileRecord, load: Callable[[Path], tuple[T, str]]) -> T:
    """Return what `load` reads from a file, if the checksum that it also returns is right; raises as `check_file`."""
    path = inside(root, record.path)
    with _named_errors(path, record):
        _check_size(path, record)
        try:
            value, digest = load(path)
        except CheckpointError:
            _check_digest(path, record, hash_file(path)[1])  # a changed file may raise anything: report the change
            raise
        _check_digest(path, record, digest)
        return value


@contextmanager
def _named_errors(path: Path, record: FileRecord) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise IncompleteCheckpointError(
            f"{path}: the file is missing; it was committed with {record.bytes} bytes"
        ) from None
    except OSError as error:
        raise CorruptCheckpointError(f"{path}: cannot be read: {error.strerror or error}") from None


def _check_size(path: Path, record: FileRecord) -> None:
    status = path.stat()
    size = status.st_size
    if not stat.S_ISREG(status.st_mode):  # reading a pipe would wait forever
        raise CorruptCheckpointError(f"{path}: is no regular file; put the file that was written in its place")
    if size != record.bytes:
        raise CorruptCheckpointError(
            f"{path}: {size} bytes, {record.bytes} were written; use another checkpoint, or copy this one again"
        )


def _check_digest(path: Path, record: FileRecord, digest: str) -> None:
    if digest != record.xxh3_128:
        raise CorruptCheckpointError(
            f"{path}: its content changed since it was written (checksum {digest}, written {record.xxh3_128}); "
            "use another checkpoint, or copy this one again"
        )


def _check_header(path: Path, record: FileRecord) -> None:
    if path.name.endswith(".safetensors.index.json"):
        read_safetensors_index(path)
    if path.suffix not in (".pt", ".safetensors"):
        return
    found = inspect_torch_file(path) if path.suffix == ".pt" else read_safetensors_header(path)
    if record.tensors and sorted(found, key=_NAME) != sorted(record.tensors, key=_NAME):
        raise CorruptCheckpointError(f"{path}: holds other tensors than were written")


def _plan(
    root: Path, only_needed_to_resume: bool
) -> tuple[int, list[FileRecord], tuple[str, ...], CheckpointError | None]:
    """Return the step, the files to check, notes, and the error that prevented all three."""
    try:
        manifest = read_manifest(root)
    except CheckpointError as error:
        return -1, [], (), error
    notes = []
    records = list(manifest.files)
    export = [record for record in records if not record.needed_to_resume]
    if export and not any(os.path.lexists(root / record.path) for record in export):
        notes.append(f"{HF_DIRECTORY} was written with this checkpoint and is gone; resuming does not need it")
        records = [record for record in records if record.needed_to_resume]
    if only_needed_to_resume:
        records = [record for record in records if record.needed_to_resume]
    known = {record.path for record in manifest.files} | {MANIFEST_FILE}
    for extra in files_below(root):
        if extra not in known:
            notes.append(f"{extra} is not part of the checkpoint")
    return manifest.step, records, tuple(notes), None


def _share(records: list[FileRecord], rank: int, size: int) -> list[FileRecord]:
    """Return this rank's files: largest first, each to the rank with the fewest bytes, alike on every rank."""
    loads = [0] * size
    shares: list[list[FileRecord]] = [[] for _ in range(size)]
    for record in sorted(records, key=lambda item: (-item.bytes, item.path)):
        target = loads.index(min(loads))
        shares[target].append(record)
        loads[target] += record.bytes
    return shares[rank]
