"""Saves in the background on GPUs: the files are those of saves that training waits for.

    CUBLAS_WORKSPACE_CONFIG=:4096:8 PYTHONPATH=. torchrun --nproc_per_node 2 packages/.../gpu_saving.py

Run from the repository's root, on two GPUs. Prints a line and exits with 1 on a difference.
"""

import os
import sys
import tempfile
from pathlib import Path

import test_train_saving
import torch
from mbridge_ckpt import open_checkpoint, verify
from mbridge_train.run.process_group import broadcast, join, leave

from testing.tiny_models import make_model


def main() -> int:
    join()
    # The two runs must train alike. Without it the embedding's gradient adds the rows of equal tokens in any order.
    torch.use_deterministic_algorithms(True)
    root = Path(broadcast(tempfile.mkdtemp()))
    if os.environ["RANK"] == "0":
        make_model("qwen2", True, root / "model")
    broadcast(None)
    weights = [
        test_train_saving.run(root / "model", root / name, in_background=name == "background")[1]
        for name in ("plain", "background")
    ]
    same = all(
        (weights[0][step][name] == tensor).all() for step, one in weights[1].items() for name, tensor in one.items()
    )
    for step in range(test_train_saving.END):
        plain, other = (open_checkpoint(root / name / f"global_step_{step}") for name in ("plain", "background"))
        assert verify(other.path).ok
        files = [record.path for record in plain.manifest.files if record.path.endswith((".pt", ".safetensors"))]
        same &= all(plain.manifest.file(path).xxh3_128 == other.manifest.file(path).xxh3_128 for path in files)
    if os.environ["RANK"] == "0":
        verdict = "ok" if same else "FAIL"
        print(f"{verdict}: {test_train_saving.END} saves of {len(files)} files, in the background and not")
    leave()
    return int(not same)


if __name__ == "__main__":
    sys.exit(main())
