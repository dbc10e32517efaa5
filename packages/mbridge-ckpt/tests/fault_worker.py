"""A process that makes checkpoints in children which are killed or whose system calls fail, on command.

Torch is imported once, in the parent, and each child is a fork of it, so that hundreds of kills take seconds. Reads one
JSON object a line on stdin and answers each with one on stdout:

    directory, step, world    what to save, and by how many ranks (gloo between them if more than one)
    kill_after                seconds after which rank `victim` gets SIGKILL
    kill_at                   rank `victim` kills itself at this position: 2i before its i-th system call, 2i + 1 after;
                              of a write, half is done before
    fail_at, errno            the i-th system call of rank `victim` raises OSError; or the first of this name
    file_limit                RLIMIT_FSIZE in bytes
    raise_at                  rank `victim` raises ValueError in the block of the save
"""

import errno
import faulthandler
import json
import os
import resource
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryDirectory

import mbridge_ckpt.publish
import torch
import torch.distributed
from mbridge_ckpt import Layout, begin_save, model_file, optimizer_file

real_write = os.write
CALLS = ("mkdir", "open", "write", "fsync", "rename", "symlink", "replace", "unlink", "rmdir")


def content(step: int, rank: int) -> dict:
    generator = torch.Generator().manual_seed(1000 * step + rank)
    return {"model": {f"layer.{i}": torch.randn(61, 67, generator=generator) for i in range(2)}, "iteration": step}


def save(directory: Path, step: int, world: int, rank: int, raises: bool) -> None:
    layout = Layout(tensor=world)
    with begin_save(directory, step=step, layout=layout) as writing:
        value = content(step, rank)
        writing.write_torch(model_file(step, layout, tensor_rank=rank), value)
        writing.write_torch(optimizer_file(step, layout, tensor_rank=rank), {"exp_avg": value["model"], "step": step})
        if rank == 0:
            writing.write_json("actor/hf_model/config.json", {"step": step})
            writing.file("actor/hf_model/other.txt").write_text("x" * 1000)
        if raises:
            raise ValueError("this rank's model is broken")
        writing.write_rank_state({"random": mbridge_ckpt.capture_random_state(), "position": step})
        writing.commit({"step": step})


class Interceptor:
    """Counts the calls that change the disk and strikes at a chosen one."""

    def __init__(self, kill_at: int | None, fail_at: int | str | None, number: int) -> None:
        self.count = 0
        self.trace: list[str] = []
        self._kill_at, self._fail_at, self._number = kill_at, fail_at, number
        for name in CALLS:
            setattr(os, name, self._wrap(name, getattr(os, name)))
        mbridge_ckpt.publish.exchange = self._wrap("exchange", mbridge_ckpt.publish.exchange)

    def _wrap(self, name: str, real):
        def call(*arguments, **options):
            if name == "open" and not arguments[1] & os.O_CREAT:
                return real(*arguments, **options)
            index, self.count = self.count, self.count + 1
            self.trace.append(name)
            if self._fail_at in (index, name):
                raise OSError(self._number, os.strerror(self._number))
            if self._kill_at == 2 * index:
                if name == "write":
                    real(arguments[0], arguments[1][: len(arguments[1]) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            try:
                return real(*arguments, **options)
            finally:
                if self._kill_at == 2 * index + 1:
                    os.kill(os.getpid(), signal.SIGKILL)

        return call


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
    if "file_limit" in command:
        resource.setrlimit(resource.RLIMIT_FSIZE, (command["file_limit"], command["file_limit"]))
    kill_at, fail_at = (command.get(key) if victim else None for key in ("kill_at", "fail_at"))
    interceptor = Interceptor(kill_at, fail_at, command.get("errno", errno.EIO))
    result = {"error": None, "kind": None}
    try:
        save(Path(command["directory"]), command["step"], world, rank, victim and "raise_at" in command)
    except Exception as error:  # noqa: BLE001 - reported to the test, whatever it is
        result = {"error": str(error), "kind": type(error).__name__}
    real_write(answer, json.dumps(result | {"calls": interceptor.count, "trace": interceptor.trace}).encode())


def run(command: dict) -> list[dict | None]:
    """Result of every rank; None for one that was killed."""
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
