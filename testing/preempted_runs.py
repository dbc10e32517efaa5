"""Stop a run of an app with SIGTERM, resume it, and compare it with one that was not stopped."""

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

from testing.app_runs import assert_same_state, metrics, saved

STEPS = 8  # so many that a run on a busy machine is not at its end when the signal comes
RESUMABLE = 75


def start(program: str, directory: Path, name: str, *overrides: str) -> subprocess.Popen[str]:
    words = [f"runner.output_dir={directory}", f"runner.experiment_name={name}", f"runner.max_steps={STEPS}"]
    return subprocess.Popen(
        [sys.executable, "-m", program, *words, *overrides],
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def children(process: int, thread: int | str = "*") -> list[int]:
    found = Path(f"/proc/{process}/task").glob(f"{thread}/children")
    return [int(number) for file in found for number in file.read_text().split()]


def descendants(process: int) -> list[int]:
    """Return the process and all that its threads started, and so on."""
    return [process, *(found for child in children(process) for found in descendants(child))]


def check_preemption(program: str, directory: Path, to: str, *overrides: str) -> None:
    """Run `program` to its end; again, with SIGTERM after the first step; and resume that.

    Args:
        to: who gets the signal: "launcher", "rank", or "all" processes of the run, as srun does it.
    """
    unbroken = start(program, directory, "unbroken", *overrides)
    _, errors = unbroken.communicate(timeout=400)
    assert unbroken.returncode == 0, errors

    stopped = start(program, directory, "stopped", *overrides)
    run = directory / "stopped"
    while stopped.poll() is None and not (run / "metrics.jsonl").is_file():
        time.sleep(0.005)
    while stopped.poll() is None and not any(step > 0 for step in metrics(run)):
        time.sleep(0.005)
    rank = children(stopped.pid, stopped.pid)[-1:]
    for process in {"launcher": [stopped.pid], "rank": rank, "all": descendants(stopped.pid)}[to]:
        with suppress(ProcessLookupError):
            os.kill(process, signal.SIGTERM)
    output, errors = stopped.communicate(timeout=400)
    assert stopped.returncode == RESUMABLE, errors
    assert "Traceback" not in errors
    steps = [step for step in metrics(run) if step > 0]
    assert 1 <= steps[-1] < STEPS
    assert (run / "report.html").is_file() and "runner.resume_dir=auto" in output
    assert (run / "checkpoints" / "latest").readlink().name == f"global_step_{steps[-1]}"

    resumed = start(program, directory, "stopped", *overrides, "runner.resume_dir=auto")
    _, errors = resumed.communicate(timeout=400)
    assert resumed.returncode == 0, errors
    assert metrics(run) == metrics(directory / "unbroken")
    for file in ("model_optim_rng.pt", "distrib_optim.pt"):
        assert_same_state(saved(run, STEPS, file), saved(directory / "unbroken", STEPS, file))
