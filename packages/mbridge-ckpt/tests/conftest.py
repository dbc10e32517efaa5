"""The process in which saves are killed and starved, and a directory for the files that they leave."""

import os
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from testing.checkpoint_faults import Worker


@pytest.fixture
def directory() -> Iterator[Path]:
    """A place in memory where there is one: a kill loses nothing that fsync would have saved, and it is faster."""
    with TemporaryDirectory(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None) as name:
        yield Path(name)


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worker]:
    worker = Worker(tmp_path_factory.mktemp("rendezvous"))
    yield worker
    worker.process.stdin.close()
    worker.process.wait(timeout=30)
