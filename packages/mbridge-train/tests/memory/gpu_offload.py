"""Offloading and streaming on one GPU: memory really returns, values come back, another process gets the weights.

    PYTHONPATH=. python packages/mbridge-train/tests/memory/gpu_offload.py

Run from the repository's root. Prints a line a check and exits with 1 if one fails. `benchmarks/memory_moves.py` says
how fast it is.
"""

import multiprocessing
import sys
import tempfile
from pathlib import Path

import torch
from mbridge_model import Parallel
from mbridge_train.weight_stream import stream_weights

from testing.tiny_models import make_model
from testing.training_runs import OVERLAPPED, build, digests, leave, make_batch, train
from testing.weight_receiver import digest, receive

# Large enough for the allocator to take memory from the driver for each buffer: 134 million parameters.
SIZES = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 8}
BUCKET_BYTES = 64 << 20
STREAMS = 3


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

    context = multiprocessing.get_context("spawn")
    connection, other = context.Pipe()
    process = context.Process(target=receive, args=(other, directory, STREAMS, "cuda", torch.bfloat16), daemon=True)
    process.start()
    other.close()
    for stream in range(STREAMS):
        train(engine, 3 + stream, 4 + stream)
        torch.cuda.synchronize()
        allocated = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        stream_weights(engine, connection, bucket_bytes=BUCKET_BYTES)
        extra = torch.cuda.max_memory_allocated() - allocated
        expected = digest(dict(engine.export_weights()))
        check(f"stream {stream}: another process has the weights", connection.recv()[1] == expected)
        buckets = f"{extra / 2**20:.0f} MiB for buckets of {BUCKET_BYTES >> 20}"
        check(f"stream {stream}: extra memory", extra <= 3 * BUCKET_BYTES, buckets)
    torch.cuda.empty_cache()
    allocated, free = torch.cuda.memory_allocated(), torch.cuda.mem_get_info()[0]
    engine.offload("weights", "gradients", "optimizer")
    freed = allocated - torch.cuda.memory_allocated()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    returned = torch.cuda.mem_get_info()[0] - free
    # The weights are a ninth of it: memory that the other process had still mapped would not return.
    figures = f"{returned} bytes more of {freed}"
    check("what was read in place is free once offloaded", returned >= 0.95 * freed >= 17 * parameters, figures)
    engine.onload()
    check("and comes back", digest(dict(engine.export_weights())) == expected)
    leave()
    process.kill()
    return int(not all(passed))


if __name__ == "__main__":
    sys.exit(main())
