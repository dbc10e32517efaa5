"""Start the ranks of a run on this machine, or join the ranks that torchrun or SLURM started.

    sys.exit(launch("my_app.loop:train", (config,), nproc_per_node=2))

The entry is named, not passed, since every rank is a process of its own that imports it. Ranks are started and
watched by torch's elastic agent; what the user sees of a failure is printed here, once, after all ranks have ended.
"""

import contextlib
import logging
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mbridge_train.errors import TrainError
from mbridge_train.run.launch_rank import USER_ERROR, Failure, run_entry

# The first statement: until then Ctrl-C would show the traceback of an import.
RANK_PROGRAM = (
    "import signal; signal.signal(signal.SIGINT, signal.SIG_DFL); "
    "from mbridge_train.run.launch_rank import main; main()"
)
HANDLED_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
USER_ERROR_DELAY = 2.0
GROUP_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(kw_only=True, slots=True, frozen=True)
class Group:
    """The process group that something outside (torchrun, SLURM) has made this process a rank of."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int | None
    source: str


def launch(entry: str, args: tuple[Any, ...] = (), nproc_per_node: int | None = None) -> int:
    """Run ``entry(*args)`` on every rank and return the exit code of the run.

    Args:
        entry: ``"module:function"``. In the function ``RANK``, ``WORLD_SIZE``, ``LOCAL_RANK``, ``MASTER_ADDR`` and
            ``MASTER_PORT`` are set, as after torchrun; the process group is not initialised.
        args: pickled for the ranks.
        nproc_per_node: ranks to start; one a GPU, or one without GPUs, if None. One rank runs in this very process.
            Inside a process group from outside nothing is started.

    Returns:
        0; 2 after a user error (an exception with the attribute ``exit_code == 2``), whose message alone is
        printed; 1 after any other exception, with the traceback of the rank that failed first; 130 after Ctrl-C;
        128 + n after signal n; an entry's own ``SystemExit`` code.

    Raises:
        TrainError: the number of ranks does not fit the GPUs, or the variables of a process group are incomplete.
    """
    group = outside_group(os.environ)
    if group is None:
        count = rank_count(nproc_per_node)
        if count > 1:
            return _launch_ranks(entry, args, count)
        group = Group(rank=0, world_size=1, local_rank=0, local_world_size=1, source="this process")
    elif nproc_per_node is not None and group.local_world_size not in (None, nproc_per_node):
        raise TrainError(
            f"launcher.nproc_per_node is {nproc_per_node}, but {group.source} started {group.local_world_size} "
            "ranks on this node. Leave launcher.nproc_per_node empty, or start as many."
        )
    with _group_environment(group):
        failure = run_entry(entry, args)
    if failure is None:
        return 0
    if group.rank > 0 and failure.exit_code == USER_ERROR:
        # All ranks have read the same input. Torchrun ends them once rank 0 has said so.
        time.sleep(USER_ERROR_DELAY)
    failure.show(rank=group.rank, world_size=group.world_size)
    return failure.exit_code


def outside_group(environment: Mapping[str, str]) -> Group | None:
    """The process group in the variables of torchrun, else of SLURM's ``srun``; None where there is none.

    Raises:
        TrainError: some of the variables are missing.
    """
    if "RANK" in environment and "WORLD_SIZE" in environment:
        names, source = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"), "torchrun"
    elif "SLURM_PROCID" in environment and int(environment.get("SLURM_NTASKS", "1")) > 1:
        names, source = ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_NTASKS_PER_NODE"), "SLURM"
    else:
        return None
    rank, world_size, local_rank, local_world_size = names
    missing = [name for name in (local_rank, "MASTER_ADDR", "MASTER_PORT") if name not in environment]
    if missing:
        raise TrainError(
            f"{rank}={environment[rank]} and {world_size}={environment[world_size]} say that {source} started this "
            f"process as one rank of several, but {' and '.join(missing)} not set. Set {' and '.join(missing)} for "
            f"every rank, or unset {rank} to run without {source}."
        )
    return Group(
        rank=int(environment[rank]),
        world_size=int(environment[world_size]),
        local_rank=int(environment[local_rank]),
        local_world_size=int(environment[local_world_size]) if local_world_size in environment else None,
        source=source,
    )


def rank_count(nproc_per_node: int | None) -> int:
    """Ranks that `launch` starts on this machine: as many as asked for, else one a GPU, or one without GPUs.

    Raises:
        TrainError: no such number, or more than the GPUs.
    """
    if nproc_per_node is not None and nproc_per_node < 1:
        raise TrainError(f"launcher.nproc_per_node is {nproc_per_node}: give 1 or more, or leave it empty.")
    import torch

    gpu_count = torch.cuda.device_count()
    if nproc_per_node is not None and 0 < gpu_count < nproc_per_node:
        raise TrainError(
            f"launcher.nproc_per_node is {nproc_per_node}, but this machine has {gpu_count} GPUs, and every rank "
            f"needs one of its own. Give {gpu_count} or less, or set CUDA_VISIBLE_DEVICES= to run on the CPU."
        )
    return nproc_per_node or max(gpu_count, 1)


@contextlib.contextmanager
def _group_environment(group: Group) -> Iterator[None]:
    """What torchrun would have set, for the time of the entry."""
    before = {name: os.environ.get(name) for name in GROUP_VARIABLES}
    os.environ.update(RANK=str(group.rank), WORLD_SIZE=str(group.world_size), LOCAL_RANK=str(group.local_rank))
    if group.local_world_size is not None:
        os.environ["LOCAL_WORLD_SIZE"] = str(group.local_world_size)
    if group.world_size == 1:
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        os.environ.setdefault("MASTER_PORT", "0")  # the store of a group of one can take any free port
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _launch_ranks(entry: str, args: tuple[Any, ...], count: int) -> int:
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # Without this every rank would start a thread a core.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // count)))
    _silence_agent()
    handlers = {number: signal.getsignal(number) for number in HANDLED_SIGNALS}
    with tempfile.TemporaryDirectory(prefix="mbridge-launch-") as name:
        directory = Path(name)
        (directory / "job").write_bytes(pickle.dumps((sys.path, entry, pickle.dumps(args), os.getpid())))
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=count,
            run_id=uuid.uuid4().hex,
            rdzv_backend="c10d",
            rdzv_endpoint="127.0.0.1:0",
            local_addr="127.0.0.1",
            max_restarts=0,
            logs_specs=DefaultLogsSpecs(log_dir=str(directory)),
        )
        try:
            elastic_launch(config, sys.executable)("-u", "-c", RANK_PROGRAM, str(directory))
            return 0
        except ChildFailedError as error:
            exit_codes = {rank: failure.exitcode for rank, failure in error.failures.items()}
            return _report(directory, exit_codes, count)
        except SignalException as error:
            return _interrupted(signal.Signals(error.sigval))
        except KeyboardInterrupt:  # before the agent has set up its handlers
            return _interrupted(signal.SIGINT)
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)


def _silence_agent() -> None:
    """The agent gives its own account of a failure; ours says the same in the user's terms.

    Each of its modules has set a level on its own logger, from the variable LOGLEVEL.
    """
    if "LOGLEVEL" not in os.environ:
        for name in list(logging.root.manager.loggerDict):
            if name.startswith(("torch.distributed.elastic", "torch.distributed.launcher")):
                logging.getLogger(name).setLevel(logging.CRITICAL)


def _interrupted(number: signal.Signals) -> int:
    _show_cursor()
    print("interrupted" if number == signal.SIGINT else f"ended by {number.name}", file=sys.stderr)
    return 128 + number


def _report(directory: Path, exit_codes: dict[int, int], count: int) -> int:
    """Print why the run failed: what happened first, since the other ranks then fail for want of their peer."""
    _show_cursor()
    failures = sorted((Failure.read(path) for path in directory.glob("rank_*.failure")), key=lambda it: it.time)
    # A rank that a signal has ended could not write; its peers' errors only say that the connection is gone.
    killed = {
        rank: signal.Signals(-code)
        for rank, code in exit_codes.items()
        if code < 0 and -code not in (signal.SIGTERM, signal.SIGINT, signal.SIGABRT)
    }
    if failures and not (killed and failures[0].exit_code != USER_ERROR):
        failures[0].show(rank=failures[0].rank, world_size=count)
        return failures[0].exit_code
    if failures:
        failures[0].show(rank=failures[0].rank, world_size=count)
    for rank, number in killed.items():
        hint = " The kernel does this when memory runs out." if number == signal.SIGKILL else ""
        print(f"error: rank {rank} of {count} was ended by {number.name}.{hint}", file=sys.stderr)
    if killed:
        return 1
    rank, code = next((it for it in exit_codes.items() if it[1] > 0), next(iter(exit_codes.items())))
    print(f"error: rank {rank} of {count} ended with exit code {code}.", file=sys.stderr)
    return code if code > 0 else 128 - code


def _show_cursor() -> None:
    """A rank that was ended inside a progress display has left the terminal's cursor hidden."""
    if sys.stderr.isatty():
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            subprocess.run(["tput", "cnorm"], stdout=sys.stderr, check=False, timeout=5)
