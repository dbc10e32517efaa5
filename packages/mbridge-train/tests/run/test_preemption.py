"""SIGTERM to a launcher, to all ranks or to one: all ranks end after the same step with one exit code, or at once."""

import os
import signal
import time
from pathlib import Path

import pytest
from mbridge_train.run.launch_rank import RESUMABLE

from testing.launched_ranks import assert_gone, start, started_ranks


def saved_steps(directory: Path) -> list[int]:
    assert len(list(directory.glob("done_*"))) == len(list(directory.glob("saved_*")))
    return [int(path.read_text()) for path in sorted(directory.glob("saved_*"))]


@pytest.mark.parametrize(("count", "to"), [(1, "launcher"), (2, "launcher"), (2, "rank"), (2, "all")])
def test_ranks_end_together_after_the_same_step(tmp_path: Path, count: int, to: str) -> None:
    process = start("preemptible", tmp_path, 60.0, 0.05, count=count)
    ranks = started_ranks(tmp_path, count, process)
    time.sleep(0.2)
    for pid in {"launcher": [process.pid], "rank": [ranks[-1]], "all": [process.pid, *ranks]}[to]:
        os.kill(pid, signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == RESUMABLE == 75, errors
    assert "Traceback" not in errors and errors in ("", "asked to end: the run saves after this step\n")
    steps = saved_steps(tmp_path)
    assert len(steps) == count and len(set(steps)) == 1
    assert_gone(*ranks)


@pytest.mark.parametrize("count", [1, 2])
def test_second_signal_ends_at_once(tmp_path: Path, count: int) -> None:
    """Although the main thread is inside a step that takes long."""
    process = start("preemptible", tmp_path, 600.0, 1000.0, count=count)
    ranks = started_ranks(tmp_path, count, process)
    process.terminate()
    time.sleep(1)
    assert process.poll() is None
    begin = time.monotonic()
    process.terminate()
    _, errors = process.communicate(timeout=60)
    assert time.monotonic() - begin < 10
    assert process.returncode == 143, errors
    assert ("ended by SIGTERM" if count > 1 else "ended by a second SIGTERM") in errors and "Traceback" not in errors
    assert saved_steps(tmp_path) == []
    assert_gone(*ranks)


@pytest.mark.parametrize("count", [1, 2])
def test_a_step_that_takes_too_long_ends_unsaved(tmp_path: Path, count: int) -> None:
    process = start("preemptible", tmp_path, 1.0, 1000.0, count=count)
    ranks = started_ranks(tmp_path, count, process)
    begin = time.monotonic()
    process.terminate()
    _, errors = process.communicate(timeout=60)
    assert 1 <= time.monotonic() - begin < 10
    assert process.returncode == 143, errors
    assert "could not save within runner.preemption_seconds=1 and ends unsaved" in errors and "Traceback" not in errors
    assert saved_steps(tmp_path) == []
    assert_gone(*ranks)


def test_zero_seconds_end_at_once(tmp_path: Path) -> None:
    process = start("preemptible", tmp_path, 0.0, 0.05, count=2)
    ranks = started_ranks(tmp_path, 2, process)
    process.terminate()
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (143, "ended by SIGTERM\n")
    assert saved_steps(tmp_path) == []
    assert_gone(*ranks)
