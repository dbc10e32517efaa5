"""The benchmark of training speed: all sides that run on a CPU start from the same loss and take the same steps."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
pytestmark = pytest.mark.benchmark


def figures(directory: Path, options: str) -> tuple[dict[str, dict[str, Any]], str]:
    """Results by side, and what was printed."""
    settings = "--model tiny --device cpu --dtype float32 --samples 4 --steps 1 --strict"
    command = [sys.executable, str(BENCHMARKS / "train_speed.py"), *settings.split(), *options.split()]
    command += ["--output", str(directory)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    assert done.returncode == 0, done.stdout
    report = json.loads((directory / "figures.json").read_text())
    assert (directory / "table.md").read_text() in done.stdout
    assert (directory / "plot.svg").read_text().count("<svg") == 1
    return {f"{result['case']}, {result['variant']}": result for result in report["results"]}, done.stdout


def test_all_sides_take_the_same_steps(tmp_path: Path) -> None:
    results, printed = figures(tmp_path, "--sequence 32 --warmup 2 --micro-batch-size 2")
    ours, theirs = (results[f"{side}, 2 a micro-batch"] for side in ("ours-torch", "fsdp2"))
    for key in ("losses", "grad_norms"):
        assert ours[key] == pytest.approx(theirs[key], rel=1e-4), key
    assert ours["losses"][2] != pytest.approx(ours["losses"][0], rel=1e-4), "the steps train nothing"
    assert ours["tokens"] == theirs["tokens"] == [4 * 32] and ours["flops"] == theirs["flops"]
    assert "megatron-te is skipped: Transformer Engine needs a GPU" in printed
    assert "ours-te is skipped: Transformer Engine needs a GPU" in printed
    assert "times the tokens/s of fsdp2" in printed


@pytest.mark.parametrize(("lengths", "samples"), [("mixed", 4), ("grpo", 9)])
def test_log_probabilities_of_varied_lengths(tmp_path: Path, lengths: str, samples: int) -> None:
    options = f"--sequence 48 --lengths {lengths} --samples {samples} --forward-only --warmup 0 --micro-batch-size 3"
    results, printed = figures(tmp_path, options + " --token-budget 64")
    theirs = results["fsdp2, padded, 3 a micro-batch"]
    for variant in ("packed to 64", "padded, 3 a micro-batch"):
        ours = results[f"ours-torch, {variant}"]
        assert ours["losses"] == pytest.approx(theirs["losses"], rel=1e-5)
        assert ours["tokens"] == theirs["tokens"] != [samples * 48]
    assert "first losses differ by" in printed
