"""The benchmark of offloading and of copying weights runs, and counts its bytes correctly."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARK = Path(__file__).parents[1] / "benchmarks" / "memory_moves.py"
pytestmark = pytest.mark.benchmark


def test_on_a_cpu(tmp_path: Path) -> None:
    output = tmp_path / "figures.json"
    command = [sys.executable, str(BENCHMARK), "--model", "tiny", "--rounds", "1", "--output", str(output)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    assert done.returncode == 0, done.stdout
    report = json.loads(output.read_text())
    layer = 64 * (64 + 2 * 32 + 64 + 3 * 96) + 2 * 64 + 64 + 2 * 32  # matrices, norms, biases
    parameters = 512 * 64 + 3 * layer + 64
    assert report["stream"]["bytes"] == 2 * parameters
    # For each bf16 weight there are three fp32 numbers, all in flat buffers with some padding.
    assert 14 * parameters <= report["offload"]["bytes"] <= 14.2 * parameters
    for row in (report["stream"]["weights"], report["offload"]["onload"]):
        assert row["seconds"] > 0 and row["share_of_plain"] > 0
    assert "of plain" in done.stdout
