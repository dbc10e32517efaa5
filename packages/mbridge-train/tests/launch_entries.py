"""Entries that the ranks of `test_launch.py` run. No Megatron: every rank is a new process."""

import ctypes
import os
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import ClassVar

import torch
import torch.distributed as dist


class InputError(Exception):
    exit_code: ClassVar[int] = 2


def rank() -> int:
    return int(os.environ["RANK"])


def sum_ranks(directory: Path, offset: int) -> None:
    """A whole run: join, communicate, leave a result a rank."""
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    total = torch.tensor([dist.get_rank() + offset])
    dist.all_reduce(total)
    text = f"{dist.get_rank()} {dist.get_world_size()} {os.environ['LOCAL_RANK']} {int(total)} {os.getpid()}"
    (directory / f"result_{dist.get_rank()}").write_text(text)
    dist.destroy_process_group()


def user_error(*ranks: int) -> None:
    if not ranks or rank() in ranks:
        raise InputError("train.jsonl, line 3: not JSON. Mend the line.")
    time.sleep(1000)


def crash(which: int) -> None:
    """One rank fails inside the run; its peers are stuck in a collective with it."""
    dist.init_process_group("gloo", timeout=timedelta(seconds=300))
    if rank() == which:
        time.sleep(0.5)
        raise ZeroDivisionError("the crash itself")
    print(f"rank {rank()} waits", flush=True)
    dist.barrier()
    time.sleep(1000)


def segmentation_fault(which: int) -> None:
    dist.init_process_group("gloo", timeout=timedelta(seconds=300))
    if rank() == which:
        ctypes.string_at(0)
    dist.barrier()
    time.sleep(1000)


def leave(code: int) -> None:
    sys.exit(code if rank() == 1 else 0)


def wait(directory: Path) -> None:
    """Hang in a collective, in native code, as long as it takes; leave the process id."""
    if int(os.environ["WORLD_SIZE"]) > 1:
        dist.init_process_group("gloo", timeout=timedelta(seconds=1000))
    (directory / f"{rank()}.part").write_text(str(os.getpid()))
    (directory / f"{rank()}.part").rename(directory / f"{rank()}.pid")
    if rank() == 0:
        time.sleep(1000)
    dist.barrier()
