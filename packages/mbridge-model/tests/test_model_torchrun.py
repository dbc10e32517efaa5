"""`load` under torchrun: it joins the group that torchrun describes."""

import os
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

from testing.tiny_models import make_model

PROGRAM = """
import sys

import torch
from mbridge_model import ModelError, Parallel, load, save_hf

try:
    model, handle = load(sys.argv[1], Parallel(tensor=2))
except ModelError as error:
    sys.exit(f"refused: {error}")
print("rank", torch.distributed.get_rank(), "of", torch.distributed.get_world_size(), flush=True)
save_hf(model, handle, sys.argv[2])
torch.distributed.destroy_process_group()
"""
TORCHRUN = (sys.executable, "-m", "torch.distributed.run")


def run(*command: str | Path, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"} | variables
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600, check=False)


def test_two_ranks(tmp_path: Path) -> None:
    make_model("qwen2", False, tmp_path / "model")
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    options = ("--nproc_per_node=2", "--master_addr=127.0.0.1", "--master_port=0", "--rdzv_backend=c10d")
    done = run(*TORCHRUN, *options, "--rdzv_endpoint=127.0.0.1:0", program, tmp_path / "model", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.split("\n")) == ["", "rank 0 of 2", "rank 1 of 2"], done.stdout
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("model", "out"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_incomplete_variables(tmp_path: Path) -> None:
    make_model("qwen2", False, tmp_path / "model")
    done = run(sys.executable, "-c", PROGRAM, tmp_path / "model", tmp_path / "out", WORLD_SIZE="2", RANK="0")
    assert done.stderr == (
        "refused: WORLD_SIZE=2 says that this process is one rank of several, but MASTER_ADDR and MASTER_PORT are not "
        "set; start the ranks with `torchrun --nproc_per_node=2 PROGRAM`, or `unset WORLD_SIZE` to run alone\n"
    )
