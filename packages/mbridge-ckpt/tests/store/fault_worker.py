"""A process that saves checkpoints in children that are killed, or whose system calls fail, on command.

Torch is imported once, in the parent, and each child is a fork of it, so that hundreds of kills take seconds. Reads one
JSON object a line on stdin and answers each with one on stdout:

    directory, step, world    what to save, and by how many ranks (gloo between them if more than one)
    kill_after                seconds after which rank `victim` gets SIGKILL
    kill_at                   rank `victim` kills itself at this position: 2i before its i-th system call, 2i + 1 after;
                              of a write, half is done before; or after the first system call of this name
    fail_at, errno            the i-th system call of rank `victim` raises OSError; or the first of this name
    file_limit                RLIMIT_FSIZE in bytes
    raise_at                  rank `victim` raises ValueError in the block of the save
    background                save with AsyncSaver; faults then strike its writer process, only kill_after the rank
    kill_writer_after         seconds after handing over until the writer process gets SIGKILL
    kill_after_commit         the rank kills itself when it has handed over
"""

import errno
import faulthandler
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryDirectory

import mbridge_ckpt
import torch
import torch.distributed
from fault_interceptor import intercept
from mbridge_ckpt import AsyncSaver, Layout, Save, begin_save, model_file, optimizer_file
from mbridge_ckpt.background import writer_process as writer_process

real_write = os.write


def content(step: int, rank: int) -> dict:
    generator = torch.Generator().manual_seed(1000 * step + rank)
    return {"model": {f"layer.{i}": torch.randn(61, 67, generator=generator) for i in range(2)}, "iteration": step}


def save(directory: Path, step: int, world: int, rank: int, raises: bool, background: bool = False) -> None:
    if background:
        with AsyncSaver() as saver:
            write(saver.begin_save, directory, step, world, rank, raises)
    else:
        write(begin_save, directory, step, world, rank, raises)


def write(begin: Callable, directory: Path, step: int, world: int, rank: int, raises: bool) -> None:
    layout = Layout(tensor=world)
    with begin(directory, step=step, layout=layout) as writing:
        value = content(step, rank)
        writing.write_torch(model_file(step, layout, tensor_rank=rank), value)
        writing.write_torch(optimizer_file(step, layout, tensor_rank=rank), {"exp_avg": value["model"], "step": step})
        if rank == 0:
            writing.write_json("actor/hf_model/config.json", {"step": step})
            if isinstance(writing, Save):
                writing.file("actor/hf_model/other.txt").write_text("x" * 1000)
        if raises:
            raise ValueError("this rank's model is broken")
        writing.write_rank_state({"random": mbridge_ckpt.capture_random_state(), "position": step})
        writing.commit({"step": step})


def child(command: dict, rank: int, answer: int) -> None:
    world, victim = command["world"], rank == command.get("victim", 0)
    if world > 1:
        torch.distributed.init_process_group(
            "gloo",
            init_method=f"file://{command['rendezvous']}",
            rank=rank,
            world_size=world,
            timeout=timedelta(seconds=60),
        )
    kill_at, fail_at = (command.get(key) if victim else None for key in ("kill_at", "fail_at"))
    strike = (kill_at, fail_at, command.get("errno", errno.EIO), command.get("file_limit"))
    directory, step, raises = Path(command["directory"]), command["step"], victim and "raise_at" in command
    result = {"error": None, "kind": None, "calls": 0, "trace": []}
    try:
        if command.get("background"):
            save_in_background(strike, command, directory, step, world, rank, raises)
        else:
            interceptor = intercept(*strike)
            result |= {"trace": interceptor.trace}
            save(directory, step, world, rank, raises)
    except Exception as error:  # noqa: BLE001 - reported to the test, whatever it is
        result |= {"error": str(error), "kind": type(error).__name__}
    result["calls"] = len(result["trace"])
    real_write(answer, json.dumps(result).encode())


def save_in_background(strike: tuple, command: dict, *arguments) -> None:
    here = str(Path(__file__).parent)
    prelude = f"import sys; sys.path.append({here!r}); from fault_interceptor import intercept; intercept{strike!r}"
    writer_process._PROGRAM = f"{prelude}; {writer_process._PROGRAM}"
    with AsyncSaver() as saver:
        saver.check()
        write(saver.begin_save, *arguments)
        if "kill_after_commit" in command:
            os.kill(os.getpid(), signal.SIGKILL)
        if "kill_writer_after" in command:
            time.sleep(command["kill_writer_after"])
            os.kill(saver.process_id, signal.SIGKILL)
        saver.wait()


def run(command: dict) -> list[dict | None]:
    """Return the result of every rank; None for a killed one."""
    children = []
    for rank in range(command["world"]):
        reading, writing = os.pipe()
        if (process := os.fork()) == 0:
            try:
                child(command, rank, writing)
            finally:
                os._exit(0)
        os.close(writing)
        children.append((process, reading))
    if "kill_after" in command:
        time.sleep(command["kill_after"])
        targets = children if command.get("victim", 0) == "all" else [children[command.get("victim", 0)]]
        for process, _ in targets:
            os.kill(process, signal.SIGKILL)
    results = []
    for process, reading in children:
        with os.fdopen(reading, "rb") as stream:
            text = stream.read()
        os.waitpid(process, 0)
        results.append(json.loads(text) if text else None)
    return results


if __name__ == "__main__":
    faulthandler.enable()
    torch.set_num_threads(1)
    with TemporaryDirectory() as scratch:  # what is imported at the first use is imported here, once
        save(Path(scratch), 1, 1, 0, False)
    for line in sys.stdin:
        print(json.dumps(run(json.loads(line))), flush=True)
