"""Fixtures and settings of the tests of every package and app."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from testing.gang import Gang, WorkerPool

# Set before torch is imported, and inherited by every process that a test starts: threads that spin while they wait for
# work take the cores from other processes.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Without a GPU, Triton's interpreter runs the kernels. Triton reads this variable on import.
if not Path("/proc/driver/nvidia/version").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")
# The first process writes the bytecode of our sources for all others.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

# A shell starts background jobs with Ctrl-C ignored, and every process that a test starts would inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def worker_pool() -> Iterator[WorkerPool]:
    """Worker processes shared by the gangs, each started on its first use."""
    pool = WorkerPool()
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def gang2(worker_pool: WorkerPool) -> Gang:
    """Two gloo workers: `gang2.run(function, *args)` calls a module-level function on both."""
    return Gang(2, worker_pool)


@pytest.fixture(scope="session")
def gang4(worker_pool: WorkerPool) -> Gang:
    """Four gloo workers, the first two of which are those of `gang2`."""
    return Gang(4, worker_pool)


@pytest.fixture(scope="session")
def tiny_vision_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of a tiny random Qwen3-VL with its processor. Tests must not change it."""
    from mbridge_sft.quickstart.model import write_tiny_vision_model

    corpus = ["Which digit is this?\nChoose one:\n0\n1\n2", "What is in the image?"]
    return write_tiny_vision_model(tmp_path_factory.mktemp("tiny") / "model", corpus, seed=1)


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Group the tests that must run in one process, and skip GPU tests where there is no GPU."""
    with_gangs = {item.path for item in items if {"worker_pool", "pool"} & set(getattr(item, "fixturenames", ()))}
    for item in items:
        # The tests of a file share fixtures; all gangs share workers, which are slow to start.
        item.add_marker(pytest.mark.xdist_group("gangs" if item.path in with_gangs else str(item.path)))

    # Torch is imported only if there are GPU tests.
    gpu_items = [item for item in items if item.get_closest_marker("gpu") is not None]
    if not gpu_items:
        return
    import torch

    if not torch.cuda.is_available():
        for item in gpu_items:
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))
