"""Decide which checkpoints to keep, and remove the others and the leftovers of dead saves."""

import os
import shutil
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from fcntl import LOCK_EX, LOCK_NB, flock
from pathlib import Path
from typing import Literal

from mbridge_ckpt.errors import CheckpointError
from mbridge_ckpt.files.durable import fsync_path
from mbridge_ckpt.files.paths import files_below
from mbridge_ckpt.manifest.layout import LATEST_LINK, MANIFEST_FILE, step_directory
from mbridge_ckpt.manifest.manifest import Manifest, read_manifest
from mbridge_ckpt.store.checkpoint import list_checkpoints
from mbridge_ckpt.store.publish import WRITER_FILE, Leftover, find_leftovers, temporary_directory

# Without locks (some network file systems) a save is presumed dead if nothing in it changed for this long.
_DEAD_AFTER_SECONDS = 24 * 3600


@dataclass(frozen=True, kw_only=True, slots=True)
class Retention:
    """Rules of which checkpoints to keep; one that any rule keeps stays. Without any rule, every checkpoint stays.

    last: the n last committed. every: those whose step is a multiple. best: the n best by `metric`, which saves store
    in `metadata["metrics"]`; `best_is` says whether the largest or the smallest value is best (ties: the newer one).
    If no checkpoint has the metric, `best` keeps all: it may be misspelled.
    """

    last: int | None = None
    every: int | None = None
    best: int | None = None
    metric: str | None = None
    best_is: Literal["max", "min"] = "max"

    def __post_init__(self) -> None:
        for name in ("last", "every", "best"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise CheckpointError(f"retention: {name} is {value}; it must be at least 1, or left out")
        if (self.best is None) != (self.metric is None):
            raise CheckpointError("retention: 'best' needs the name of a metric, and a metric needs 'best'")


@dataclass(frozen=True, slots=True)
class Verdict:
    """One directory and what happens to it, with the reason."""

    path: Path
    action: Literal["keep", "remove", "restore"]
    reason: str


@dataclass(frozen=True, slots=True)
class PruneReport:
    """Every directory that `prune` looked at. `freed_bytes` counts the files of removed checkpoints."""

    verdicts: tuple[Verdict, ...]
    freed_bytes: int


def prune(
    directory: str | Path, retention: Retention, *, protect: Iterable[str | Path] = (), dry_run: bool = False
) -> PruneReport:
    """Remove what `retention` does not keep and what dead saves left behind; call it on one rank only.

    Never removed: the newest checkpoint, the one that `latest` points to, those in `protect` (pass the one that a run
    was resumed from), and directories without our manifest or with files that it does not list. A checkpoint first
    loses its name in one rename, so that none is ever incomplete under its name.
    """
    root = Path(directory)
    protected = {Path(path).resolve() for path in protect} | {(root / LATEST_LINK).resolve()}
    verdicts, freed = [], 0
    manifests: dict[Path, Manifest] = {}
    for path in list_checkpoints(root):
        try:
            manifests[path] = _own(path)
        except CheckpointError as error:
            verdicts.append(Verdict(path, "keep", str(error)))
    manifests = dict(sorted(manifests.items(), key=lambda item: item[1].commit_order, reverse=True))
    reasons = _wanted(manifests, retention)
    for path, manifest in manifests.items():
        if reason := reasons.get(path) or ("protected" if path.resolve() in protected else None):
            verdicts.append(Verdict(path, "keep", reason))
        else:
            if not dry_run:
                _remove(path, manifest.step)
            verdicts.append(Verdict(path, "remove", "no rule keeps it"))
            freed += manifest.total_bytes
    for leftover in find_leftovers(root) if root.is_dir() else []:
        verdicts.append(_settle(leftover, dry_run))
    return PruneReport(tuple(verdicts), freed)


def _own(path: Path) -> Manifest:
    if path.is_symlink():
        raise CheckpointError(f"{path} is a symlink; only directories of this place are removed")
    manifest = read_manifest(path)
    if path.name != step_directory(manifest.step):
        raise CheckpointError(f"{path} holds step {manifest.step}; it was renamed by hand and is left alone")
    foreign = sorted(set(files_below(path)) - {record.path for record in manifest.files} - {MANIFEST_FILE})
    if foreign:
        raise CheckpointError(
            f"{path} holds files that are not part of it ({foreign[0]}); move them to have it removed"
        )
    return manifest


def _wanted(manifests: dict[Path, Manifest], retention: Retention) -> dict[Path, str]:
    """Return the reason to keep each checkpoint (given newest first) that a rule keeps."""
    paths = list(manifests)
    if retention.last is None and retention.every is None and retention.best is None:
        return dict.fromkeys(paths, "no retention rule was given")
    reasons: dict[Path, str] = {}
    if retention.best is not None:
        found = {path: _metric(manifest, retention.metric or "") for path, manifest in manifests.items()}
        scores = {path: score for path, score in found.items() if score is not None}
        sign = -1 if retention.best_is == "max" else 1
        for path in sorted(scores, key=lambda path: sign * scores[path])[: retention.best]:
            reasons[path] = f"among the {retention.best} best by {retention.metric} ({scores[path]:g})"
        if not scores:
            reason = f"no checkpoint has the metric {retention.metric!r}, so none is known as worse"
            reasons = dict.fromkeys(paths, reason)
    if retention.every is not None:
        for path, manifest in manifests.items():
            if manifest.step % retention.every == 0:
                reasons[path] = f"its step is a multiple of {retention.every}"
    for path in paths[: retention.last or 1]:
        reasons[path] = f"among the {retention.last} newest" if retention.last else "the newest"
    return reasons


def _metric(manifest: Manifest, name: str) -> float | None:
    metrics = manifest.metadata.get("metrics")
    value = metrics.get(name) if isinstance(metrics, dict) else None
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def _remove(path: Path, step: int) -> None:
    doomed = temporary_directory(path.parent, step, "deleting")
    os.rename(path, doomed)
    fsync_path(path.parent)
    shutil.rmtree(doomed)


def _settle(leftover: Leftover, dry_run: bool) -> Verdict:
    path, kind = leftover.path, leftover.kind
    final = path.parent / step_directory(leftover.step)
    is_new_link = kind == "link" and time.time() - path.lstat().st_mtime < 60
    if is_new_link or (kind == "saving" and _alive(path)):
        return Verdict(path, "keep", "its save is running, or was until recently")
    if kind == "replaced" and not os.path.lexists(final):
        if not dry_run:
            os.rename(path, final)
            fsync_path(final.parent)
        return Verdict(path, "restore", f"moved aside by a save that died; moved back to {final.name}")
    if not dry_run:
        path.unlink(missing_ok=True) if kind == "link" else shutil.rmtree(path)
    return Verdict(path, "remove", f"left by an interrupted {'removal' if kind == 'deleting' else 'save'}")


def _alive(path: Path) -> bool:
    """Return whether a save's process is alive: it holds a lock on its mark, deleted just before the rename."""
    with suppress(FileNotFoundError):
        descriptor = os.open(path / WRITER_FILE, os.O_RDWR | os.O_CLOEXEC)
        try:
            flock(descriptor, LOCK_EX | LOCK_NB)
            return False
        except BlockingIOError:
            return True
        except OSError:
            return time.time() - _newest_change(path) < _DEAD_AFTER_SECONDS
        finally:
            os.close(descriptor)
    # No mark: killed right before it was made or right after it was removed, or about to be renamed this moment.
    return time.time() - _newest_change(path) < 60


def _newest_change(path: Path) -> float:
    times = [path.stat().st_mtime]
    for directory, _, names in os.walk(path):
        for name in names:
            with suppress(OSError):
                times.append(os.lstat(os.path.join(directory, name)).st_mtime)
    return max(times)
