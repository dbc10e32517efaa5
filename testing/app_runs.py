"""Run an app as a user does, and compare the files of its runs."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
TIMES = re.compile(r"time/|\w+_per_second$|time$")


def execute(*words: str) -> str:
    """Return the output of `python *words`, which must succeed without a traceback or a warning."""
    path = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    done = subprocess.run(
        [sys.executable, *words],
        # The program imports `testing` and the packages from the same places as the test that starts it.
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(path)},
        capture_output=True,
        text=True,
        timeout=840,
        check=False,
    )
    assert done.returncode == 0, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
    assert "Traceback" not in done.stderr and "Warning" not in done.stderr, done.stderr
    return done.stdout


def metrics(run: Path) -> dict[int, dict[str, float]]:
    """Return the metrics of each step without those that a clock measures."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {
        record["step"]: {name: value for name, value in record.items() if not TIMES.match(name)} for record in records
    }


def saved(run: Path, step: int, file: str) -> Any:
    """Return the content of a file of the first model-parallel rank in a checkpoint."""
    directory = run / "checkpoints" / f"global_step_{step}" / "actor" / f"iter_{step:07d}" / "mp_rank_00"
    return torch.load(directory / file, weights_only=True)


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every tensor and scalar in nested containers, with its place."""
    if isinstance(value, dict | list | tuple):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from leaves(item, f"{path}.{key}")
    else:
        yield path, value


def assert_same_state(one: Any, other: Any) -> None:
    """Assert that two nested containers are equal, tensors bit for bit."""
    first, second = dict(leaves(one)), dict(leaves(other))
    assert first.keys() == second.keys()
    for place, value in first.items():
        if isinstance(value, torch.Tensor):
            # Compare bits, so that 0.0 and -0.0 differ.
            assert value.dtype == second[place].dtype, place
            assert value.numpy(force=True).tobytes() == second[place].numpy(force=True).tobytes(), place
        else:
            assert value == second[place], place


def tree(directory: Path) -> dict[str, bytes | None]:
    """Return the content of every file, and None for every directory, by path."""
    return {
        path.relative_to(directory).as_posix(): path.read_bytes() if path.is_file() else None
        for path in directory.rglob("*")
    }


def files(directory: Path) -> set[str]:
    """Return the modification time of every file, by path."""
    return {f"{path} {path.stat().st_mtime_ns}" for path in directory.rglob("*")}
