"""Open a committed checkpoint, load its files with their checksums verified, and find the one to resume from."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mbridge_ckpt.errors import CheckpointError, IncompleteCheckpointError, naming
from mbridge_ckpt.files.json_text import parse_json
from mbridge_ckpt.formats.torch_reader import load_torch, load_torch_hashed
from mbridge_ckpt.manifest.layout import Layout, rank_state_file, step_of
from mbridge_ckpt.manifest.manifest import FileRecord, Manifest, read_manifest
from mbridge_ckpt.store.publish import find_leftovers
from mbridge_ckpt.store.rank_state import unwrap_rank_state
from mbridge_ckpt.store.ranks import Ranks
from mbridge_ckpt.store.verify import check_file, load_checked, verify

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A committed checkpoint, made by `open_checkpoint`; only its manifest has been read.

    The `load_*` methods raise IncompleteCheckpointError (no such file), CorruptCheckpointError (size, checksum,
    content) or UnsafeCheckpointError (would run code, lies outside), naming the file.
    """

    path: Path
    manifest: Manifest

    @property
    def step(self) -> int:
        return self.manifest.step

    @property
    def layout(self) -> Layout:
        return self.manifest.layout

    @property
    def metadata(self) -> dict[str, Any]:
        return self.manifest.metadata

    def has(self, path: str) -> bool:
        """Return whether the checkpoint was committed with this file."""
        return any(record.path == path for record in self.manifest.files)

    def verified(self, path: str) -> Path:
        """Return the absolute path of a file after verifying its size and checksum, which reads it once."""
        return check_file(self.path, self._record(path))

    def load_torch(self, path: str, *, map_location: Any = "cpu", mmap: bool = False) -> Any:
        """Load a torch.save file, see `load_torch`; it is read once, for the content and for its checksum."""
        if mmap:
            return load_torch(self.verified(path), map_location=map_location, mmap=True)
        return load_checked(self.path, self._record(path), lambda file: load_torch_hashed(file, map_location))

    def load_json(self, path: str) -> Any:
        """Load a JSON file."""
        file = self.verified(path)
        with naming(file):
            return parse_json(file.read_bytes())

    def _record(self, path: str) -> FileRecord:
        with naming(self.path):
            return self.manifest.file(path)

    def load_rank_state(self, rank: int) -> dict[str, Any] | None:
        """Return what rank `rank` stored with `Save.write_rank_state`; None if the writing job had no such rank."""
        path = rank_state_file(rank)
        if not self.has(path):
            return None
        return unwrap_rank_state(self.load_torch(path), rank, self.path / path)


@dataclass(frozen=True, slots=True)
class PassedOver:
    """A directory that `find_resume` passed over, and why."""

    path: Path
    reason: str


@dataclass(frozen=True, slots=True)
class Resume:
    """The result of `find_resume`: the checkpoint (None if there is none), and what it passed over, newest first."""

    checkpoint: Checkpoint | None
    passed_over: tuple[PassedOver, ...]


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Open `…/global_step_N`, or `…/latest`, or a checkpoints directory with a `latest` in it.

    Raises IncompleteCheckpointError when there is no committed checkpoint, CorruptCheckpointError when its manifest
    is damaged; the message names the path.
    """
    root = Path(path)
    if not root.is_dir():
        raise IncompleteCheckpointError(f"{root} is not a directory; give a global_step_N directory")
    if step_of(root.resolve().name) is None and (root / "latest").is_dir():
        root = root / "latest"
    try:
        root = root.resolve(strict=True)
    except (OSError, RuntimeError) as error:
        raise IncompleteCheckpointError(f"{root}: {error}") from None
    return Checkpoint(root, read_manifest(root))


def list_checkpoints(directory: str | Path) -> list[Path]:
    """List the directories named `global_step_N` in a checkpoints directory, largest step first."""
    root = Path(directory)
    if not root.is_dir():
        return []
    steps = [(step, path) for path in root.iterdir() if (step := step_of(path.name)) is not None and path.is_dir()]
    return [path for _, path in sorted(steps, reverse=True)]


def _commit_order(path: Path) -> tuple[Any, ...]:
    """Sort by the time of the commit; a checkpoint whose manifest cannot be read counts as the newest.

    A run that went back to an earlier step leaves later steps of an abandoned branch behind; its own are newer.
    """
    try:
        return 0, *read_manifest(path).commit_order
    except CheckpointError:
        return (1,)


def find_resume(directory: str | Path, *, group: "ProcessGroup | None" = None) -> Resume:
    """Find the last committed checkpoint in `directory` whose files needed to resume match their checksums.

    Collective over `group` (see `begin_save`): each rank reads a share of the files, and all get the same answer.
    Faults of a HuggingFace export do not count. Directories that were passed over come with the reason.
    """
    ranks = Ranks(group)
    root = Path(directory)
    newest_first = sorted(list_checkpoints(root), key=_commit_order, reverse=True) if ranks.rank == 0 else None
    candidates: list[Path] = ranks.from_first(newest_first)
    leftovers = ranks.from_first(find_leftovers(root) if ranks.rank == 0 and root.is_dir() else [])
    passed_over = [
        PassedOver(item.path, f"an unfinished save or removal ({item.kind}); `mbridge-ckpt prune` cleans it up")
        for item in leftovers
    ]
    for path in candidates:
        try:
            report = verify(path, only_needed_to_resume=True, group=group)
        except CheckpointError as error:
            passed_over.append(PassedOver(path, str(error)))
            continue
        if report.resumable:
            return Resume(open_checkpoint(path), tuple(passed_over))
        passed_over.append(PassedOver(path, "; ".join(fault.message for fault in report.faults)))
    return Resume(None, tuple(passed_over))
