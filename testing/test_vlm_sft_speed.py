"""The benchmark of fine-tuning speed: both sides compute the same."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from mbridge_config import HFFacts
from mbridge_config.plan.parameters import count_parameters

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
pytestmark = pytest.mark.benchmark


@pytest.fixture(scope="module")
def data() -> ModuleType:
    specification = importlib.util.spec_from_file_location("vlm_sft_data", BENCHMARKS / "vlm_sft_data.py")
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules["vlm_sft_data"] = module  # dataclasses look it up
    specification.loader.exec_module(module)
    return module


def test_both_sides_take_the_same_steps(tmp_path: Path) -> None:
    """Losses and gradient norms of three steps agree in fp32 from the same weights."""
    output = tmp_path / "figures.json"
    options = "--model tiny --dtype float32 --same-weights --cases ours-torch fsdp2 --token-budget 256"
    options += " --micro-batch-size 3 --samples 4 --steps 1 --warmup 2 --strict --recompute off"
    command = [sys.executable, str(BENCHMARKS / "vlm_sft_speed.py"), *options.split(), "--output", str(output)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    assert done.returncode == 0, done.stdout
    report = json.loads(output.read_text())
    results = {result["case"]: result for result in report["results"]}
    ours, theirs = results["ours-torch"], results["fsdp2"]
    for key in ("losses", "grad_norms"):
        assert ours[key] == pytest.approx(theirs[key], rel=1e-4), key
    assert ours["tokens"] == theirs["tokens"] and ours["flops"] == theirs["flops"]
    speeds = [result["summary"]["tokens_per_second"][0] for result in (ours, theirs)]
    assert report["speedup"]["ours-torch"] == pytest.approx(speeds[0] / speeds[1])
    assert "times the tokens/s of fsdp2" in done.stdout


@pytest.mark.parametrize(("name", "billions"), [("2.5-3b", 3.75), ("3-4b", 4.44)])
def test_real_geometry(data: ModuleType, name: str, billions: float, tmp_path: Path) -> None:
    """Sizes are those published, and sequences fit the smallest default token budget."""
    data.write_config(name, tmp_path)
    parameters = count_parameters(HFFacts.load(tmp_path))
    assert parameters is not None and parameters / 1e9 == pytest.approx(billions, abs=0.005)
    assert max(len(example.tokens) for batch in data.make_batches(name, 24, 5) for example in batch) <= 4096
