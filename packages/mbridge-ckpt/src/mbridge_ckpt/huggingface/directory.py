"""A directory that appears whole under its name or not at all, for content that is not a checkpoint."""

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Self

from mbridge_ckpt.errors import CheckpointError
from mbridge_ckpt.files.durable import fsync_path, fsync_tree_directories
from mbridge_ckpt.files.hashing import HashingFile
from mbridge_ckpt.files.paths import inside
from mbridge_ckpt.manifest.layout import refuse_inside_checkpoint
from mbridge_ckpt.store.checkpoint_writer import FileSink, SaveStream


class NewDirectory(FileSink):
    """Files go into a hidden directory beside `final`, which `commit` renames; without it the block's end removes it.

    Raises CheckpointError if `final` exists, since nothing is overwritten, or lies in a checkpoint.
    """

    def __init__(self, final: Path) -> None:
        self.final = Path(os.path.abspath(final))
        self.path = self.final.with_name(f".{self.final.name}.writing-{uuid.uuid4().hex[:12]}")
        self._refuse_existing()
        refuse_inside_checkpoint(self.final)
        self.path.mkdir(parents=True)

    @contextmanager
    def stream(self, path: str) -> Iterator[SaveStream]:
        """Open a new file, which is on the disk when the block ends."""
        target = inside(self.path, path)
        target.parent.mkdir(parents=True, exist_ok=True)
        with HashingFile(target) as file:
            yield SaveStream(file.write)
            file.close()

    def rename(self, old: str, new: str) -> None:
        """Rename a file."""
        os.rename(inside(self.path, old), inside(self.path, new))

    def commit(self) -> Path:
        """Give the directory its final name and return it."""
        fsync_tree_directories(self.path)
        self._refuse_existing()
        os.rename(self.path, self.final)
        fsync_path(self.final.parent)
        return self.final

    def _refuse_existing(self) -> None:
        if os.path.lexists(self.final):
            raise CheckpointError(f"{self.final} exists; nothing is overwritten, give another directory")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self.path, ignore_errors=True)
