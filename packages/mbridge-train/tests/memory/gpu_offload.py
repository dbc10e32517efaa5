"""Offloading on one GPU: the memory is really freed, values come back, and snapshots are swapped in and out.

    PYTHONPATH=. python packages/mbridge-train/tests/memory/gpu_offload.py

Run from the repository's root. Prints a line a check and exits with 1 if one fails. `benchmarks/memory_moves.py` says
how fast it is.
"""

import sys
import tempfile
from pathlib import Path

import torch
from mbridge_model import Parallel
from mbridge_train.engine.weight_snapshot import Snapshot

from testing.tiny_models import make_model
from testing.training_runs import OVERLAPPED, build, digests, leave, make_batch, train

# Large enough for the allocator to take memory from the driver for each buffer: 134 million parameters.
SIZES = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 8}


def main() -> int:
    directory = Path(tempfile.mkdtemp())
    make_model("qwen2", True, directory, **SIZES)
    engine = build(directory, Parallel(), OVERLAPPED, dtype="bfloat16")
    train(engine, 0, 2)
    before = digests(engine), engine.logprobs(make_batch(9))
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    allocated, free = torch.cuda.memory_allocated(), torch.cuda.mem_get_info()[0]
    parameters = sum(parameter.numel() for chunk in engine.model for parameter in chunk.parameters())
    passed = []

    def check(name: str, condition: bool, figures: str = "") -> None:
        passed.append(condition)
        print("ok:" if condition else "FAIL:", name, figures)

    for turn in range(3):
        engine.offload("weights", "gradients", "optimizer")
        # What is allocated now takes the place of what is still being copied out, unless the streams are in order.
        garbage = torch.full((allocated // 2,), 255, dtype=torch.uint8, device="cuda")
        freed = allocated - (torch.cuda.memory_allocated() - garbage.nbytes)
        check(f"turn {turn}: freed", freed >= 17.9 * parameters, f"{freed} bytes, {freed / parameters:.3f} a parameter")
        del garbage
        torch.cuda.empty_cache()
        returned = torch.cuda.mem_get_info()[0] - free
        check(f"turn {turn}: free for other processes", returned >= 0.9 * freed, f"{returned} bytes more")
        garbage = torch.full((allocated // 2,), 255, dtype=torch.uint8, device="cuda")
        del garbage  # and the same on the way back
        engine.onload()
        after = engine.logprobs(make_batch(9))
        check(f"turn {turn}: log probabilities", all(map(torch.equal, before[1], after)))
        check(f"turn {turn}: weights, master weights, moments", digests(engine) == before[0])
    (record,) = train(engine, 2, 3)
    check("a step after it", record[3] and record[0] == record[0], f"loss {record[0]:.4f}")

    snapshot, then = Snapshot(engine), engine.logprobs(make_batch(9))
    train(engine, 3, 5)
    trained, now = digests(engine), engine.logprobs(make_batch(9))
    torch.cuda.synchronize()
    allocated = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    with snapshot.swapped_in(engine):
        extra = torch.cuda.max_memory_allocated() - allocated
        check("a snapshot has the weights of then", all(map(torch.equal, then, engine.logprobs(make_batch(9)))))
    check("and gives back those of now", digests(engine) == trained)
    check("which differ", not all(map(torch.equal, then, now)))
    check("extra memory of a swap", extra <= 129 << 20, f"{extra / 2**20:.0f} MiB")
    leave()
    return int(not all(passed))


if __name__ == "__main__":
    sys.exit(main())
