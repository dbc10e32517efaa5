"""Checkpoints between the backends, on one GPU: saved on Transformer Engine's layers, resumed on plain torch, and back.

    PYTHONPATH=. python packages/mbridge-train/tests/checkpoint/gpu_checkpoints.py

Run from the repository's root. Prints a line a check and exits with 1 if one fails.
"""

import sys
import tempfile
from itertools import product
from pathlib import Path
from typing import Any

from mbridge_model import Parallel
from mbridge_train.checkpoint.load import load_checkpoint
from mbridge_train.checkpoint.save import save_checkpoint

from testing.tiny_models import make_model
from testing.training_runs import SHARDED, build, digests, leave, train

SIZES = {"num_attention_heads": 8, "hidden_size": 256, "num_key_value_heads": 4}
FORMATS: Any = ("torch", "torch_dist")


def main() -> int:
    root = Path(tempfile.mkdtemp())
    passed = []
    for family, tied in (("qwen2", True), ("qwen3", False)):
        make_model(family, tied, root / family, **SIZES)
        for (saver, resumer), file_format in product((("te", "torch"), ("torch", "te")), FORMATS):
            name = f"{family}, {saver} to {resumer}, {file_format}:"
            output = root / f"{family}-{saver}-{file_format}"
            engine = build(root / family, Parallel(), SHARDED, dtype="bfloat16", backend=saver)
            train(engine, 0, 3)
            saved = save_checkpoint(engine, output, step=3, loop_state={}, file_format=file_format)
            expected = digests(engine)
            ((loss, *_),) = train(engine, 3, 4)
            engine.close()

            engine = build(root / family, Parallel(), SHARDED, dtype="bfloat16", backend=resumer, weights=False)
            load_checkpoint(engine, saved)
            found = digests(engine)
            different = sorted(key for key in expected | found if expected.get(key) != found.get(key))
            ((resumed, *_),) = train(engine, 3, 4)
            engine.close()
            passed += [bool(expected) and not different, abs(resumed / loss - 1) < 1e-2]
            print("ok:" if passed[-2] else "FAIL:", name, f"{len(expected)} tensors and numbers", different[:3])
            print("ok:" if passed[-1] else "FAIL:", name, f"next loss {loss:.5f}, resumed {resumed:.5f}")
    leave()
    return 0 if all(passed) else 1


if __name__ == "__main__":
    sys.exit(main())
