"""The benchmark of the data workers runs, and each of two ranks decodes half of the images."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARK = Path(__file__).parents[1] / "benchmarks" / "data_workers.py"
pytestmark = pytest.mark.benchmark


def test_on_a_cpu(tmp_path: Path) -> None:
    output = tmp_path / "figures.json"
    command = [sys.executable, str(BENCHMARK), "--rows", "4", "--batch", "4", "--side", "64", "--output", str(output)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    assert done.returncode == 0, done.stdout
    report = json.loads(output.read_text())
    assert [rank["images"] for rank in report["DP 1"]] == [4]
    assert [rank["images"] for rank in report["DP 2"]] == [2, 2]
    assert sum(rank["patches"] for rank in report["DP 2"]) == report["DP 1"][0]["patches"]
    assert all(rank["cpu_seconds"] > 0 for rank in (*report["DP 1"], *report["DP 2"]))
    assert done.stdout.count("CPU seconds of the workers") == 3
