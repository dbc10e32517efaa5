"""The engine on GPUs with NCCL, against the same plain PyTorch loop on the CPU that the gloo tests compare with.

    PYTHONPATH=.:packages/mbridge-train/tests torchrun --nproc_per_node 2 packages/mbridge-train/tests/gpu_layouts.py

Run from the repository's root. One GPU runs the cases of one rank. Prints a line a case and exits with 1 on a
difference.
"""

import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import test_engine
import torch
from mbridge_model import Parallel
from mbridge_train.processes import join, leave

from testing.tiny_models import make_model

TOLERANCE = 1e-4  # cuBLAS and the CPU add in different orders; the first step agrees to 1e-5


def main() -> int:
    os.environ.setdefault("RANK", "0")
    os.environ.setdefault("WORLD_SIZE", "1")
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "29555")
    world_size = int(os.environ["WORLD_SIZE"])
    cases: list[Any] = [("1 GPU packed", Parallel(), test_engine.PACKED, test_engine.SHARDED)]
    if world_size == 2:
        cases = test_engine.CASES_2
    root = Path(tempfile.gettempdir()) / f"gpu-layouts-{os.getppid()}"  # one launcher, so alike on every rank
    failed, case_number = False, 0
    for family, tied in (("qwen2", True), ("qwen3", False)):
        directory = root / os.environ["RANK"] / f"{family}-{tied}"  # the same weights, made by every rank for itself
        make_model(family, tied, directory)
        expected = test_engine.twin(directory)
        for name, *arguments in cases:
            for dtype in ("float32", "bfloat16"):
                started = time.time()
                # Megatron-Core forgets its groups without ending them, and NCCL's buffers would fill the GPU: every
                # case has a process group of its own, met in a new file, for NCCL's addresses stay in an old one.
                case_number += 1
                torch.distributed.init_process_group(
                    "cpu:gloo,cuda:nccl",
                    init_method=f"file://{root}/case-{case_number}",
                    rank=int(os.environ["RANK"]),
                    world_size=world_size,
                )
                join()
                result = test_engine.train(str(directory), *arguments, dtype)
                leave()
                losses = worst(result["losses"], expected["losses"])
                norms = worst(result["norms"], expected["norms"])
                limit = TOLERANCE if dtype == "float32" else 0.1
                bad = max(losses, norms) > limit
                failed |= bad
                if os.environ["RANK"] == "0":
                    print(
                        f"{'FAIL' if bad else 'ok  '} {family} {name:24} {dtype:9} loss {losses:.1e} "
                        f"grad norm {norms:.1e} {time.time() - started:.1f} s",
                        flush=True,
                    )
    return int(failed)


def worst(ours: list[float], theirs: list[float]) -> float:
    """Largest relative difference; losses near zero are compared absolutely."""
    return max(abs(a - b) / max(1.0, abs(b)) for a, b in zip(ours, theirs, strict=True))


if __name__ == "__main__":
    sys.exit(main())
