"""Entries that the ranks of `test_launch.py` run. Every rank is a new process: torch only where it is needed."""

import os
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import ClassVar


class InputError(Exception):
    exit_code: ClassVar[int] = 2


def rank() -> int:
    return int(os.environ["RANK"])


def sum_ranks(directory: Path, offset: int) -> None:
    """A whole run: join, communicate, leave a result a rank."""
    import torch
    import torch.distributed as dist

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
    import torch.distributed as dist

    dist.init_process_group("gloo", timeout=timedelta(seconds=300))
    if rank() == which:
        time.sleep(0.5)
        raise ZeroDivisionError("the crash itself")
    print(f"rank {rank()} waits", flush=True)
    dist.barrier()
    time.sleep(1000)


def killed(which: int) -> None:
    """Die as the kernel kills a rank when memory runs out. Its peer's connection breaks in the collective."""
    import torch.distributed as dist

    dist.init_process_group("gloo", timeout=timedelta(seconds=300))
    if rank() == which:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()
    time.sleep(1000)


def leave(code: int) -> None:
    sys.exit(code if rank() == 1 else 0)


def wait(directory: Path) -> None:
    """Hang as long as it takes; leave the process id."""
    (directory / f"{rank()}.part").write_text(str(os.getpid()))
    (directory / f"{rank()}.part").rename(directory / f"{rank()}.pid")
    time.sleep(1000)


def preemptible(directory: Path, seconds: float, step_seconds: float) -> None:
    """Run steps until stopped, each with a collective; `saved_<rank>` holds the step after which the run ended."""
    import torch
    import torch.distributed as dist
    from mbridge_train.run.preemption import Preemption

    dist.init_process_group("gloo", timeout=timedelta(seconds=300))
    with Preemption(seconds) as preemption:
        (directory / f"{rank()}.part").write_text(str(os.getpid()))
        (directory / f"{rank()}.part").rename(directory / f"{rank()}.pid")
        step = 0
        while step == 0 or not preemption.agreed():
            time.sleep(step_seconds)
            dist.all_reduce(torch.ones(3))
            step += 1
        (directory / f"saved_{rank()}").write_text(str(step))
        time.sleep(0.3 * (1 - rank()))  # the report of rank 0
        (directory / f"done_{rank()}").touch()


def saves_in_background(directory: Path, steps: int) -> None:
    """Go on from the newest checkpoint, save each step in the background, and leave the ids of all processes."""
    import torch
    import torch.distributed as dist
    from mbridge_ckpt import AsyncSaver, Layout, find_resume, model_file

    directory.mkdir(exist_ok=True)
    (directory / f"rank_{rank()}_{os.getpid()}").touch()
    dist.init_process_group("gloo", timeout=timedelta(minutes=5))
    layout, checkpoints = Layout(tensor=2), directory / "checkpoints"
    state, first = torch.randn(50_000, generator=torch.Generator().manual_seed(rank())), 0
    if (found := find_resume(checkpoints).checkpoint) is not None:
        first = found.step
        state = found.load_torch(model_file(first, layout, tensor_rank=rank()))["model"]["state"]
    dist.barrier()
    with AsyncSaver() as saver:
        (directory / f"writer_{rank()}_{saver.process_id}").touch()
        for step in range(first + 1, steps + 1):
            gradient = torch.randn(len(state), generator=torch.Generator().manual_seed(1000 * step + rank()))
            dist.all_reduce(gradient)
            state.mul_(0.99).add_(gradient)
            time.sleep(0.1)
            saver.check()
            with saver.begin_save(checkpoints, step=step, layout=layout) as save:
                save.write_torch(model_file(step, layout, tensor_rank=rank()), {"model": {"state": state}})
                save.commit()
            dist.barrier()
            if rank() == 0:
                (directory / "saving").touch()
