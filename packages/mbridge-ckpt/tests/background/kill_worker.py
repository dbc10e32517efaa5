"""Start small runs that save in the background, on command, in forks of a process that has imported torch.

Reads one JSON object a line on stdin: `directory` of the checkpoints, `world` (number of ranks), `place`, an empty
directory. Each command starts a launcher, which starts the ranks; nobody ends a rank that hangs. `place` receives files
named <role>_<rank>_<pid>, and error_<rank> with the error of a rank that failed. A run goes on from its newest
checkpoint up to step STEPS. The answer, one line, is the launcher's process id.
"""

import ctypes
import json
import os
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path

import mbridge_ckpt
import torch
import torch.distributed
from mbridge_ckpt import AsyncSaver, Layout, find_resume, model_file

STEPS = 5
PR_SET_PDEATHSIG = 1


def launcher(directory: Path, world: int, place: Path) -> None:
    (place / f"launcher_0_{os.getpid()}").touch()
    own = os.getpid()
    for number in range(world):
        if os.fork() == 0:
            # As launch_rank does.
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
            if os.getppid() != own:
                os._exit(1)
            (place / f"rank_{number}_{os.getpid()}").touch()
            try:
                rank(directory, world, number, place)
            except BaseException as error:  # noqa: BLE001 - read by the test
                (place / f"error_{number}").write_text(f"{type(error).__name__}: {error}")
            os._exit(0)
    for _ in range(world):
        os.wait()


def rank(directory: Path, world: int, number: int, place: Path) -> None:
    if world > 1:
        torch.distributed.init_process_group(
            "gloo",
            init_method=f"file://{place / 'store'}",
            rank=number,
            world_size=world,
            timeout=timedelta(minutes=5),
        )
    layout = Layout(tensor=world)
    state, first = torch.randn(50_000, generator=torch.Generator().manual_seed(number)), 0
    if (found := find_resume(directory).checkpoint) is not None:
        file = model_file(found.step, layout, tensor_rank=number)
        state, first = found.load_torch(file)["model"]["state"], found.step
    with AsyncSaver() as saver:
        (place / f"writer_{number}_{saver.process_id}").touch()
        for step in range(first + 1, STEPS + 1):
            gradient = torch.randn(len(state), generator=torch.Generator().manual_seed(1000 * step + number))
            if world > 1:
                torch.distributed.all_reduce(gradient)
            state.mul_(0.99).add_(gradient)
            time.sleep(0.02)
            saver.check()
            with saver.begin_save(directory, step=step, layout=layout) as save:
                save.write_torch(model_file(step, layout, tensor_rank=number), {"model": {"state": state}})
                save.write_rank_state({"random": mbridge_ckpt.capture_random_state()})
                if number == 0:
                    save.write_json("state/loop.json", {"step": step})
                save.commit()


if __name__ == "__main__":
    torch.set_num_threads(1)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # launchers are reaped by the kernel
    for line in sys.stdin:
        command = json.loads(line)
        if (process := os.fork()) == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            sys.stdin.close()
            launcher(Path(command["directory"]), command["world"], Path(command["place"]))
            os._exit(0)
        print(process, flush=True)
