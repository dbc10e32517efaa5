"""The engine on GPUs with NCCL, against the same plain PyTorch loop on the CPU that the gloo tests compare with.

    PYTHONPATH=. torchrun --nproc_per_node 2 packages/mbridge-train/tests/engine/gpu_layouts.py

Run from the repository's root. One GPU runs the cases of one rank. Prints a line for each case and exits with 1 on a
difference.
"""

import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import test_engine
import test_engine_vision
import torch
from mbridge_model import Parallel
from mbridge_train.run.process_group import join, leave

from testing.tiny_models import make_model, make_vision_model

TOLERANCE = 1e-4  # cuBLAS and the CPU add in different orders; the first step agrees to 1e-5


def main() -> int:
    os.environ.setdefault("RANK", "0")
    os.environ.setdefault("WORLD_SIZE", "1")
    world_size = int(os.environ["WORLD_SIZE"])
    # The parent process is the launcher, the same for all ranks. Every rank makes the same weights for itself.
    root = Path(tempfile.gettempdir()) / f"gpu-layouts-{os.getppid()}"
    models = root / os.environ["RANK"]
    models.mkdir(parents=True)
    groups = Groups(root, world_size)
    failed = False
    text_cases: list[Any] = [("1 GPU packed", Parallel(), test_engine.PACKED, test_engine.SHARDED)]
    for family, tied in (("qwen2", True), ("qwen3", False)):
        make_model(family, tied, models / family)
        expected = test_engine.twin(models / family)
        for name, *arguments in test_engine.CASES_2 if world_size == 2 else text_cases:
            for dtype in ("float32", "bfloat16"):
                with groups.joined():
                    result = test_engine.train(str(models / family), *arguments, dtype)
                failed |= compare(family, name, dtype, result["losses"], result["norms"], expected)
    for family, tied in test_engine_vision.FAMILIES.items():
        make_vision_model(family, tied, models / family)
        record, _ = test_engine_vision.twin(models / family)
        expected = {"losses": [loss for loss, _ in record], "norms": [norm for _, norm in record]}
        cases = test_engine_vision.CASES if world_size == 2 else [(1, "1 GPU", Parallel(), test_engine_vision.PACKED)]
        for size, name, *arguments in cases:
            if size > world_size:
                continue
            for dtype in ("float32", "bfloat16"):
                with groups.joined():
                    ours, _ = test_engine_vision.run(models / family, *arguments, dtype)
                failed |= compare(family, name, dtype, [loss for loss, _ in ours], [norm for _, norm in ours], expected)
    return int(failed)


class Groups:
    """A process group for each case.

    Megatron-Core forgets its groups without ending them, and NCCL's buffers would fill the GPU. Each group meets in a
    new file, for NCCL's addresses stay in an old one.
    """

    def __init__(self, root: Path, world_size: int) -> None:
        self.root, self.world_size, self.count = root, world_size, 0

    @contextmanager
    def joined(self) -> Iterator[None]:
        self.count += 1
        torch.distributed.init_process_group(
            "cpu:gloo,cuda:nccl",
            init_method=f"file://{self.root}/case-{self.count}",
            rank=int(os.environ["RANK"]),
            world_size=self.world_size,
        )
        join()
        yield
        leave()


def compare(
    family: str, name: str, dtype: str, losses: list[float], norms: list[float], expected: dict[str, Any]
) -> bool:
    """Whether the case fails; rank 0 prints a line."""
    loss, norm = worst(losses, expected["losses"]), worst(norms, expected["norms"])
    bad = max(loss, norm) > (TOLERANCE if dtype == "float32" else 0.1)
    if os.environ["RANK"] == "0":
        verdict = "FAIL" if bad else "ok  "
        print(f"{verdict} {family:11} {name:24} {dtype:9} loss {loss:.1e} grad norm {norm:.1e}", flush=True)
    return bad


def worst(ours: list[float], theirs: list[float]) -> float:
    """Largest relative difference; losses near zero are compared absolutely."""
    return max(abs(a - b) / max(1.0, abs(b)) for a, b in zip(ours, theirs, strict=True))


if __name__ == "__main__":
    sys.exit(main())
