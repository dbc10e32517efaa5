"""The benchmark of loading HuggingFace weights runs, and reports its ranks and bytes correctly."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARK = Path(__file__).parents[1] / "benchmarks" / "load_speed.py"
pytestmark = pytest.mark.benchmark


def test_on_a_cpu(tmp_path: Path) -> None:
    output = tmp_path / "figures.json"
    command = [sys.executable, str(BENCHMARK), "--model", "tiny", "--rounds", "1", "--output", str(output)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    assert done.returncode == 0, done.stdout
    report = json.loads(output.read_text())
    layer = 64 * (64 + 2 * 32 + 64 + 3 * 96) + 2 * 64 + 64 + 2 * 32  # matrices, norms, biases
    weights = 2 * (512 * 64 + 3 * layer + 64)
    assert weights < report["bytes"] < weights + 10_000, "and the header"
    assert report["tensor_parallel"] == 2 and len(report["rounds"]["load"]) == 2
    assert min(*report["rounds"]["load"], *report["rounds"]["plain"]) > 0
    assert "of the plain read's rate" in done.stdout
