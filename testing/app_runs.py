"""Whole runs of an app: running them, and comparing what they leave."""

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
    """What `python *words` prints; it must succeed without a traceback or a warning."""
    path = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    done = subprocess.run(
        [sys.executable, *words],
        # The program imports `testing`, as the test file that starts it does, and the packages from where it does.
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
    """By step, without what is measured with a clock."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {
        record["step"]: {name: value for name, value in record.items() if not TIMES.match(name)} for record in records
    }


def saved(run: Path, step: int, file: str) -> Any:
    """Content of a file of the first model-parallel rank's part of a checkpoint."""
    directory = run / "checkpoints" / f"global_step_{step}" / "actor" / f"iter_{step:07d}" / "mp_rank_00"
    return torch.load(directory / file, weights_only=True)


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every tensor and scalar in nested containers, with its place."""
    if isinstance(value, dict | list | tuple):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from leaves(item, f"{path}.{key}")
    else:
        yield path, value


def assert_same_state(one: Any, other: Any) -> None:
    """Assert that two nested containers are the same, tensors bit for bit."""
    first, second = dict(leaves(one)), dict(leaves(other))
    assert first.keys() == second.keys()
    for place, value in first.items():
        if isinstance(value, torch.Tensor):
            # Bits, so that not even 0.0 and -0.0 count as the same.
            assert value.dtype == second[place].dtype, place
            assert value.numpy(force=True).tobytes() == second[place].numpy(force=True).tobytes(), place
        else:
            assert value == second[place], place


def tree(directory: Path) -> dict[str, bytes | None]:
    """Every file with its content, every directory with None."""
    return {
        path.relative_to(directory).as_posix(): path.read_bytes() if path.is_file() else None
        for path in directory.rglob("*")
    }


def files(directory: Path) -> set[str]:
    """Every file with the time of its last change."""
    return {f"{path} {path.stat().st_mtime_ns}" for path in directory.rglob("*")}
