"""Speed of loading a HuggingFace directory into a Megatron model, compared with a plain read of the same bytes.

    ./uvw run python benchmarks/load_speed.py --model 7b --tensor-parallel 2      # two GPUs
    ./uvw run python benchmarks/load_speed.py --model tiny --tensor-parallel 2    # on a CPU, as in the test

The files contain random bf16 weights with the geometry of Qwen2.5; each rank is a process. "load" is the part of
`mbridge_model.load` after the model is built. "plain" reads an even share of the files' bytes on each rank, in blocks
through a pinned buffer into GPU memory, or on a CPU into memory that has been used before. Ranks share GPUs if there
are more ranks than GPUs. Times are those of the slowest rank, medians of the rounds after a warm-up round, with the
files in the page cache. Extra memory is the peak of a rank's private host memory above its size with the model built.
"""

import argparse
import json
import os
import socket
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing
from side_by_side import write_weights
from torch import distributed
from train_data import GEOMETRIES, write_config
from transformers import AutoModelForCausalLM

BLOCK = 64 << 20


def seconds_of(action: Callable[[], Any], device: torch.device) -> float:
    """Return the seconds of the slowest rank, measured after all are ready."""
    distributed.barrier()
    begin = time.perf_counter()
    action()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    seconds = torch.tensor(time.perf_counter() - begin)
    distributed.all_reduce(seconds, op=distributed.ReduceOp.MAX)
    return seconds.item()


def private_memory() -> int:
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


def extra_memory(action: Callable[[], Any]) -> int:
    """Return the peak of private memory during `action` above its size before, of the rank with the highest."""
    before, peak, done = private_memory(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.002):
            peak = max(peak, private_memory())

    thread = threading.Thread(target=watch)
    thread.start()
    action()
    done.set()
    thread.join()
    extra = torch.tensor(max(peak - before, 0))
    distributed.all_reduce(extra, op=distributed.ReduceOp.MAX)
    return int(extra)


def read_share(files: list[Path], target: torch.Tensor, buffer: torch.Tensor) -> None:
    """Fill `target` with this rank's even share of the bytes of all files, one after the other."""
    begin = distributed.get_rank() * len(target)
    filled, offset = 0, 0  # bytes of the share, and the offset of the file among all
    for file in files:
        size = file.stat().st_size
        with file.open("rb", buffering=0) as stream:
            stream.seek(max(0, begin - offset))
            while filled < len(target) and stream.tell() < size:
                count = min(len(buffer), len(target) - filled, size - stream.tell())
                place = target[filled : filled + count]
                read = stream.readinto(memoryview((buffer if target.is_cuda else place)[:count].numpy()))
                if target.is_cuda:
                    place[:read].copy_(buffer[:read])
                filled += read
        offset += size


def measure(rank: int, name: str, ranks: int, directory: Path, rounds: int, port: int, report: Path) -> None:
    gpus = torch.cuda.device_count()
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank % gpus if gpus else rank), "WORLD_SIZE": str(ranks)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    from mbridge_model import Parallel, load
    from mbridge_train.run.process_group import join, leave

    torch.set_num_threads(max(1, (os.cpu_count() or 1) // ranks))
    if 0 < gpus < ranks:
        distributed.init_process_group("gloo")  # NCCL allows one rank per GPU
    device = join()
    model, handle = load(directory, Parallel(tensor=ranks), dtype=torch.bfloat16)
    files = sorted(directory.glob("*.safetensors"))
    size = sum(file.stat().st_size for file in files)
    buffer = torch.empty(BLOCK, dtype=torch.uint8, pin_memory=device.type == "cuda")
    target = torch.zeros(size // ranks, dtype=torch.uint8, device=device)
    loads, plain = [], []
    for _ in range(rounds + 1):
        plain.append(seconds_of(partial(read_share, files, target, buffer), device))
        loads.append(seconds_of(partial(handle.bridge.load_weights, model), device))
    extra = extra_memory(partial(handle.bridge.load_weights, model))
    if rank == 0:
        seconds = {"load": statistics.median(loads[1:]), "plain": statistics.median(plain[1:])}
        figures = {
            "model": name,
            "tensor_parallel": ranks,
            "device": f"{min(ranks, gpus)} x {torch.cuda.get_device_name()}" if gpus else "CPU",
            "torch": torch.__version__,
            "bytes": size,
            "seconds": seconds,
            "rounds": {"load": loads, "plain": plain},
            "share_of_plain": seconds["plain"] / seconds["load"],
            "share_bytes": size // ranks,
            "extra_bytes": extra,
        }
        report.write_text(json.dumps(figures, indent=1))
    leave()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=GEOMETRIES, default="1.5b")
    parser.add_argument("--tensor-parallel", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5, help="after a first one")
    parser.add_argument("--output", type=Path, help="write the figures here, as JSON")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary, socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        directory, report = Path(temporary) / "model", Path(temporary) / "report.json"
        directory.mkdir()
        write_config(arguments.model, directory)
        write_weights(AutoModelForCausalLM, directory, torch.bfloat16)
        settings = (arguments.model, arguments.tensor_parallel, directory, arguments.rounds, port, report)
        torch.multiprocessing.spawn(measure, settings, nprocs=arguments.tensor_parallel)
        figures = json.loads(report.read_text())
    if arguments.output is not None:
        arguments.output.write_text(json.dumps(figures, indent=1))
    gigabytes = figures["bytes"] / 1e9
    print(f"{arguments.model}, TP {arguments.tensor_parallel}, {figures['device']}, {gigabytes:.2f} GB in all")
    for what, seconds in figures["seconds"].items():
        print(f"{what:6} {seconds:8.3f} s  {gigabytes / seconds:7.2f} GB/s")
    print(f"load at {figures['share_of_plain']:.2f} of the plain read's rate")
    print(f"extra memory of a rank {figures['extra_bytes'] / 2**30:.2f} GiB")


if __name__ == "__main__":
    main()
