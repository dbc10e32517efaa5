"""Save checkpoints in processes that are killed or whose system calls fail, and check the files that remain."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from mbridge_ckpt import Layout, find_resume, model_file, open_checkpoint, optimizer_file

WORKER = Path(__file__).parents[1] / "packages/mbridge-ckpt/tests/store/fault_worker.py"


class Worker:
    """Start fault_worker.py."""

    def __init__(self, scratch: Path) -> None:
        self._scratch = scratch
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        command = [sys.executable, str(WORKER)]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self._count = 0

    def save(self, directory: Path, step: int, world: int = 1, **fault: object) -> list[Any]:
        """Return for every rank a dict with `error`, `kind`, `calls` and `trace`, or None if the rank was killed."""
        self._count += 1
        command = {"directory": str(directory), "step": step, "world": world} | fault
        command["rendezvous"] = str(self._scratch / f"rendezvous_{self._count}")
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(command) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())


def content(step: int, rank: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1000 * step + rank)
    return {"model": {f"layer.{i}": torch.randn(61, 67, generator=generator) for i in range(2)}, "iteration": step}


def assert_newest_is_whole(directory: Path, at_least: int, world: int = 1) -> int:
    """Assert that the newest checkpoint is committed and holds what was saved, and that resuming skips none."""
    latest = open_checkpoint(directory / "latest").step  # first, because a writer may still be running
    resume = find_resume(directory)
    assert resume.checkpoint is not None and resume.checkpoint.step >= at_least
    assert all("unfinished" in item.reason for item in resume.passed_over), resume.passed_over
    step = resume.checkpoint.step
    for rank in range(world):
        expected = content(step, rank)
        found = resume.checkpoint.load_torch(model_file(step, Layout(tensor=world), tensor_rank=rank))
        moments = resume.checkpoint.load_torch(optimizer_file(step, Layout(tensor=world), tensor_rank=rank))
        assert found["iteration"] == moments["step"] == step
        for name, tensor in expected["model"].items():
            assert torch.equal(found["model"][name], tensor) and torch.equal(moments["exp_avg"][name], tensor)
    assert latest <= step  # older, if the kill came between rename and link
    return step


def forget_step_2(directory: Path) -> None:
    shutil.rmtree(directory / "global_step_2")
    (directory / "latest").unlink(missing_ok=True)
    (directory / "latest").symlink_to("global_step_1")
