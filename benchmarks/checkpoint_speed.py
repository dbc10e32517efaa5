"""How fast checkpoints are saved, loaded and verified, beside plain writing and reading of the same bytes.

    ./uvw run python benchmarks/checkpoint_speed.py --gigabytes 1 --rounds 5
    ./uvw run python benchmarks/checkpoint_speed.py --gigabytes 1 --ranks 2 --json

Each round does everything once, one after the other, so that other work on the machine falls on all alike; the figures
are medians. "write" is os.write of the same bytes from memory into one file a rank, with one fsync; "read" is reading
that file in blocks of 8 MiB into one buffer. Before all reading the files are dropped from the page cache
(POSIX_FADV_DONTNEED). With two ranks, all rows are of both at once, and times are those of the slower one.
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed
import torch.multiprocessing
from mbridge_ckpt import AsyncSaver, CheckpointWriter, Layout, begin_save, load_torch, open_checkpoint, verify

WRITE_BLOCK = 64 << 20
READ_BLOCK = 8 << 20
# What is compared with what.
BASELINE = {"save": "write", "async_total": "write", "load": "read", "verify": "read", "load_and_verify": "read"}


def make_tensors(gigabytes: float, rank: int) -> dict[str, torch.Tensor]:
    """A state of float32 tensors of 4 to 64 MiB, as layers of a model have."""
    generator = torch.Generator().manual_seed(rank)
    tensors: dict[str, torch.Tensor] = {}
    rest = int(gigabytes * 1e9)
    while rest > 0:
        size = min((4 << 20) * (1, 4, 16)[len(tensors) % 3], rest)
        tensors[f"layer.{len(tensors)}"] = torch.randn(max(size // 4, 1), generator=generator)
        rest -= size
    return tensors


def plain_write(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for tensor in tensors.values():
        view = memoryview(tensor.numpy()).cast("B")
        while len(view):
            view = view[os.write(descriptor, view[:WRITE_BLOCK]) :]
    os.fsync(descriptor)
    os.close(descriptor)


def plain_read(path: Path) -> None:
    buffer = memoryview(bytearray(READ_BLOCK))
    with path.open("rb", buffering=0) as stream:
        while stream.readinto(buffer):
            pass


def write_content(save: CheckpointWriter, tensors: dict[str, torch.Tensor]) -> Path:
    save.write_torch(f"actor/rank_{rank_and_size()[0]}.pt", {"model": tensors})
    return save.commit()


def drop_from_cache(directory: Path) -> None:
    for path in directory.rglob("*"):
        if path.is_file() and not path.is_symlink():
            descriptor = os.open(path, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def rank_and_size() -> tuple[int, int]:
    initialised = torch.distributed.is_initialized()
    return (torch.distributed.get_rank(), torch.distributed.get_world_size()) if initialised else (0, 1)


def barrier() -> None:
    if torch.distributed.is_initialized():
        torch.distributed.barrier()


def process_memory(process: int | str) -> dict[str, int]:
    """Private and shared resident bytes; of a peak only the sum is known to Linux."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    fields = {line.split(":")[0]: line.split()[1] for line in lines if line.endswith(" kB")}
    return {name: int(fields[name]) * 1024 for name in ("VmHWM", "RssAnon", "RssShmem")}


def measure(gigabytes: float, directory: Path, rounds: int) -> dict[str, Any]:
    """Seconds of each round by what was done, and the memory it took."""
    rank, size = rank_and_size()
    tensors = make_tensors(gigabytes, rank)
    layout = Layout(data=size)
    content = sum(tensor.nbytes for tensor in tensors.values())
    seconds: dict[str, list[float]] = {}
    memory: dict[str, int] = {}

    def timed(name: str, action: Callable[[], Any], *, cold: bool = False) -> None:
        if cold:
            drop_from_cache(directory)
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        base = process_memory("self")["VmHWM"]
        barrier()
        begin = time.perf_counter()
        action()
        seconds.setdefault(name, []).append(time.perf_counter() - begin)
        peak = process_memory("self")["VmHWM"] - base
        memory[f"{name}_peak"] = max(memory.get(f"{name}_peak", 0), peak)

    def save() -> None:
        with begin_save(directory / "sync", step=1, layout=layout) as saving:
            write_content(saving, tensors)

    plain, file = directory / f"plain_{rank}", f"actor/rank_{rank}.pt"
    checkpoint = directory / "sync" / "global_step_1"
    with AsyncSaver() as saver:

        def save_in_background() -> None:
            with saver.begin_save(directory / "async", step=1, layout=layout) as saving:
                write_content(saving, tensors)

        timed("async_blocked_first", save_in_background)
        saver.wait()
        for _ in range(rounds):
            for path in (plain, directory / "sync", directory / "async"):
                barrier()
                if path == plain or rank == 0:
                    shutil.rmtree(path, ignore_errors=True)
                    path.unlink(missing_ok=True) if path == plain else None
            timed("write", lambda: plain_write(plain, tensors))
            timed("save", save)
            begin = time.perf_counter()
            timed("async_blocked", save_in_background)
            saver.wait()
            seconds.setdefault("async_total", []).append(time.perf_counter() - begin)
            timed("read", lambda: plain_read(plain), cold=True)
            timed("load", lambda: load_torch(checkpoint / file), cold=True)
            timed("load_and_verify", lambda: open_checkpoint(checkpoint).load_torch(file), cold=True)
            timed("verify", lambda: verify(checkpoint), cold=True)
        writer = process_memory(saver.process_id or "self")
        memory |= {"arena": saver.copied_bytes, "writer_private": writer["RssAnon"]}
    return {"bytes": content, "seconds": seconds, "memory": memory}


def run_rank(rank: int, arguments: argparse.Namespace, directory: str, answers: Any) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{directory}.rendezvous", rank=rank, world_size=arguments.ranks
    )
    answers.put(measure(arguments.gigabytes / arguments.ranks, Path(directory), arguments.rounds))
    barrier()
    torch.distributed.destroy_process_group()


def summarise(results: list[dict[str, Any]]) -> dict[str, Any]:
    size = sum(result["bytes"] for result in results)
    medians = {}
    for name in results[0]["seconds"]:
        rounds = zip(*(result["seconds"][name] for result in results), strict=True)
        medians[name] = statistics.median(max(times) for times in rounds)
    rows = {
        name: {"seconds": round(seconds, 4), "gigabytes_per_second": round(size / seconds / 1e9, 3)}
        for name, seconds in medians.items()
    }
    for name, baseline in BASELINE.items():
        rows[name]["ratio"] = round(medians[baseline] / medians[name], 2)
    memory = {name: max(result["memory"][name] for result in results) for name in results[0]["memory"]}
    versions = {"python": platform.python_version(), "torch": torch.__version__, "linux": platform.release()}
    return {"bytes": size, "rows": rows, "memory_per_rank": memory, "cores": os.cpu_count(), "versions": versions}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=1.0, help="of all ranks together, in units of 10^9 bytes")
    parser.add_argument("--directory", type=Path, default=None, help="on the disk to measure; default: a temporary one")
    parser.add_argument("--ranks", type=int, choices=(1, 2), default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.directory) as directory:
        if arguments.ranks == 1:
            torch.set_num_threads(1)
            results = [measure(arguments.gigabytes, Path(directory), arguments.rounds)]
        else:
            answers = torch.multiprocessing.get_context("spawn").SimpleQueue()
            torch.multiprocessing.spawn(run_rank, args=(arguments, directory, answers), nprocs=arguments.ranks)
            results = [answers.get() for _ in range(arguments.ranks)]
            Path(f"{directory}.rendezvous").unlink(missing_ok=True)
    summary = summarise(results)
    if arguments.json:
        print(json.dumps(summary, indent=2))
        return
    for name, row in summary["rows"].items():
        ratio = f"{row['ratio']:5.2f} of {BASELINE[name]}" if "ratio" in row else ""
        print(f"{name:20} {row['seconds']:8.3f} s {row['gigabytes_per_second']:7.2f} GB/s  {ratio}")
    for name, count in summary["memory_per_rank"].items():
        print(f"{name:26} {count / 1e6:8.0f} MB")
    print(f"{summary['bytes'] / 1e9:.2f} GB, {summary['cores']} cores, {summary['versions']}")


if __name__ == "__main__":
    main()
