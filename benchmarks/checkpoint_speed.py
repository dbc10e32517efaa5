"""Speed of saving, loading and verifying checkpoints, compared with plain writing and reading of the same bytes.

    ./uvw run python benchmarks/checkpoint_speed.py --gigabytes 1 --rounds 5
    ./uvw run python benchmarks/checkpoint_speed.py --gigabytes 1 --ranks 2 --json

Each round measures everything once, in a different order, so that other load of the machine affects all rows alike. The
table shows medians and the fastest round. "write" is os.write of the same bytes from memory into one file per rank,
with one fsync; "read" reads the checkpoint's file in blocks of 8 MiB into one buffer. "touch" fills as much fresh
memory, which "load" needs and "read" does not; "map" loads with mmap=True, which does not need it either. Both
"…_and_verify" compare the checksum. The files are dropped from the page cache before each read (POSIX_FADV_DONTNEED).
With two ranks, both work at the same time, and the table shows the times of the slower one.
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
# The plain operation to compare each operation with.
BASELINE = {
    "save": "write",
    "async_total": "write",
    "load": "read",
    "verify": "read",
    "load_and_verify": "read",
    "map_and_verify": "read",
}


def make_tensors(gigabytes: float, rank: int) -> dict[str, torch.Tensor]:
    """Return a state of float32 tensors of 4 to 64 MiB, the sizes of a model's layers."""
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
    """Return private and shared resident bytes; for a peak Linux knows only the sum."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    fields = {line.split(":")[0]: line.split()[1] for line in lines if line.endswith(" kB")}
    return {name: int(fields[name]) * 1024 for name in ("VmHWM", "RssAnon", "RssShmem")}


def measure(gigabytes: float, directory: Path, rounds: int) -> dict[str, Any]:
    """Return the seconds of each round and the memory, by operation."""
    rank, size = rank_and_size()
    tensors = make_tensors(gigabytes, rank)
    layout = Layout(data=size)
    content = sum(tensor.nbytes for tensor in tensors.values())
    seconds: dict[str, list[float]] = {}
    memory: dict[str, int] = {}

    def timed(name: str, action: Callable[[], Any], *, cold: bool = False) -> None:
        if cold:
            drop_from_cache(directory)
        Path("/proc/self/clear_refs").write_text("5")  # reset the peak
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

        def time_async() -> None:
            begin = time.perf_counter()
            timed("async_blocked", save_in_background)
            saver.wait()
            seconds.setdefault("async_total", []).append(time.perf_counter() - begin)

        writing = [lambda: timed("write", lambda: plain_write(plain, tensors)), lambda: timed("save", save), time_async]
        reading = [
            lambda: timed("read", lambda: plain_read(checkpoint / file), cold=True),
            lambda: timed("load", lambda: load_torch(checkpoint / file), cold=True),
            lambda: timed("load_and_verify", lambda: open_checkpoint(checkpoint).load_torch(file), cold=True),
            lambda: timed("map_and_verify", lambda: open_checkpoint(checkpoint).load_torch(file, mmap=True), cold=True),
            lambda: timed("verify", lambda: verify(checkpoint), cold=True),
            lambda: timed("touch", lambda: torch.empty(content, dtype=torch.uint8).fill_(1)),
        ]
        timed("async_blocked_first", save_in_background)
        saver.wait()
        for number in range(rounds):
            barrier()
            plain.unlink(missing_ok=True)
            if rank == 0:
                shutil.rmtree(directory / "sync", ignore_errors=True)
                shutil.rmtree(directory / "async", ignore_errors=True)
            os.sync()
            for actions in (writing, reading):
                for index in range(len(actions)):
                    actions[(index + number) % len(actions)]()
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
    rows: dict[str, dict[str, float]] = {}
    for name in results[0]["seconds"]:
        rounds = [max(times) for times in zip(*(result["seconds"][name] for result in results), strict=True)]
        rows[name] = {"median_seconds": statistics.median(rounds), "fastest_seconds": min(rounds)}
    for name, row in rows.items():
        row["gigabytes_per_second"] = size / row["median_seconds"] / 1e9
        if name in BASELINE:
            for kind in ("median", "fastest"):
                row[f"{kind}_ratio"] = rows[BASELINE[name]][f"{kind}_seconds"] / row[f"{kind}_seconds"]
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
        ratio = ""
        if name in BASELINE:
            ratio = f"{row['median_ratio']:5.2f} of {BASELINE[name]} ({row['fastest_ratio']:.2f} in the fastest rounds)"
        speed = f"{row['median_seconds']:8.3f} s {row['gigabytes_per_second']:7.2f} GB/s"
        print(f"{name:20} {speed} {ratio}")
    for name, count in summary["memory_per_rank"].items():
        print(f"{name:26} {count / 1e6:8.0f} MB")
    print(f"{summary['bytes'] / 1e9:.2f} GB, {summary['cores']} cores, {summary['versions']}")


if __name__ == "__main__":
    main()
