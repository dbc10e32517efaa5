"""Fixtures and rules that hold for the tests of every package and app."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from testing.gang import Gang, WorkerPool

# Before anything imports torch, and for every process that a test starts: idle threads of one process that wait for
# work take the cores from the others.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Without a GPU Triton's interpreter runs the kernels. Triton asks when it is imported.
if not Path("/proc/driver/nvidia/version").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")
# The first process compiles our own sources for all others.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

# A shell starts what runs in the background with Ctrl-C ignored, which every process started by a test would inherit.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def worker_pool() -> Iterator[WorkerPool]:
    """Worker processes shared by the gangs; none is started before a test runs something in it."""
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
    """Directory of a tiny random Qwen3-VL with its processor. Not to be changed."""
    from mbridge_sft.quickstart.tiny import write_tiny_model

    corpus = ["Which digit is this?\nChoose one:\n0\n1\n2", "What is in the image?"]
    return write_tiny_model(tmp_path_factory.mktemp("tiny") / "model", corpus, seed=1)


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Say what runs together when tests run in several processes; skip what needs a GPU where there is none."""
    with_gangs = {item.path for item in items if {"worker_pool", "pool"} & set(getattr(item, "fixturenames", ()))}
    for item in items:
        # A file's tests share its fixtures; all gangs share workers that took long to start.
        item.add_marker(pytest.mark.xdist_group("gangs" if item.path in with_gangs else str(item.path)))

    # Torch is asked only if there is a test for GPUs.
    gpu_items = [item for item in items if item.get_closest_marker("gpu") is not None]
    if not gpu_items:
        return
    import torch

    if not torch.cuda.is_available():
        for item in gpu_items:
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))
