"""Kill the launcher, a rank or a writer of a run that `launch` started: all ends at once, and a resume goes on."""

import os
import re
import signal
import time
from pathlib import Path

import pytest
import torch
from mbridge_ckpt import Layout, find_resume, model_file

from testing.launched_ranks import is_running, start

STEPS = 6
pytestmark = pytest.mark.slow


def process_ids(directory: Path, role: str = "*") -> list[int]:
    return [int(path.name.rpartition("_")[2]) for path in sorted(directory.glob(f"{role}_[01]_*"))]


def finish(directory: Path) -> list[torch.Tensor]:
    """Run to the end, and return the final state of both ranks."""
    process = start("saves_in_background", directory, STEPS, count=2)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    checkpoint = find_resume(directory / "checkpoints").checkpoint
    assert checkpoint is not None and checkpoint.step == STEPS
    files = (model_file(STEPS, Layout(tensor=2), tensor_rank=rank) for rank in range(2))
    return [checkpoint.load_torch(file)["model"]["state"] for file in files]


def kill(directory: Path, victim: str, seconds: float) -> None:
    """Kill `victim` some time after the first save has begun; all others end within 5 s, and one says why."""
    process = start("saves_in_background", directory, STEPS, count=2)
    while not (directory / "saving").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    time.sleep(seconds)
    everyone = [process.pid, *process_ids(directory)]
    pid = process.pid if victim == "launcher" else process_ids(directory, victim)[-1]
    os.kill(pid, signal.SIGKILL)
    killed = time.monotonic()
    # A machine with more running processes than cores needs longer for everything.
    limit = 5.0 * max(1.0, os.getloadavg()[0] / len(os.sched_getaffinity(0)))
    _, errors = process.communicate(timeout=60)
    while left := [process for process in everyone if is_running(process)]:
        assert time.monotonic() - killed < limit, left
        time.sleep(0.02)
    assert time.monotonic() - killed < limit
    causes = {"rank": (1, "rank 1 of 2 was ended by SIGKILL"), "writer": (2, r"rank 1 \(.* was killed by SIGKILL")}
    if victim in causes:
        code, cause = causes[victim]
        assert process.returncode == code and re.search(cause, errors, re.DOTALL), errors


def test_kills(tmp_path: Path) -> None:
    expected = finish(tmp_path / "unbroken")
    for number, victim in enumerate(("launcher", "rank", "writer")):
        directory = tmp_path / victim
        kill(directory, victim, seconds=0.03 * number)
        for stale in directory.glob("*_[01]_*"):
            stale.unlink()
        (directory / "saving").unlink()
        assert all(map(torch.equal, finish(directory), expected))
