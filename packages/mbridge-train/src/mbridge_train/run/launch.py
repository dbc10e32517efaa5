"""Start the ranks of a run on this machine, or join the ranks that torchrun or SLURM started.

    sys.exit(launch("my_app.loop:train", (config,), nproc_per_node=2))

The entry is passed by name, because every rank is a separate process that imports it. Torch's elastic agent starts and
watches the ranks. A failure is printed here, once, after all ranks have ended.
"""

import contextlib
import fcntl
import logging
import os
import pickle
import shutil
import signal
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from rich.console import Console

from mbridge_train.errors import TrainError
from mbridge_train.run.launch_rank import PREEMPTIBLE_FILE, RESUMABLE, USER_ERROR, Failure, run_entry

# Before any import, during which Ctrl-C would print a traceback.
RANK_PROGRAM = (
    "import signal; signal.signal(signal.SIGINT, signal.SIG_DFL); "
    "from mbridge_train.run.launch_rank import main; main()"
)
HANDLED_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
USER_ERROR_DELAY = 2.0  # seconds
DIRECTORY_PREFIX = "mbridge-launch-"
GROUP_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(kw_only=True, slots=True, frozen=True)
class Group:
    """The process group in which torchrun or SLURM made this process a rank; `source` is the name of that launcher."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int | None
    source: str


def launch(entry: str, args: tuple[Any, ...] = (), nproc_per_node: int | None = None) -> int:
    """Run ``entry(*args)`` on every rank and return the exit code of the run.

    Args:
        entry: ``"module:function"``. In the function ``RANK``, ``WORLD_SIZE``, ``LOCAL_RANK``, ``MASTER_ADDR`` and
            ``MASTER_PORT`` are set, as after torchrun; the process group is not initialized.
        args: pickled for the ranks.
        nproc_per_node: number of ranks to start; None: one per GPU, or one where there is no GPU. A single rank runs
            in this process. Nothing is started where torchrun or SLURM already started the ranks.

    Returns:
        0 on success; 2 after a user error (an exception with the attribute ``exit_code == 2``), of which only the
        message is printed; 1 after any other exception, with the traceback of the rank that failed first; 130 after
        Ctrl-C; 75 after a preemption that was saved (see `Preemption`); 128 + n after signal n; the code of a
        ``SystemExit`` that the entry raised.

    Raises:
        TrainError: more ranks are asked for than there are GPUs, or another number than torchrun or SLURM started,
            or the environment variables of a process group are incomplete.
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
        # All ranks fail on the same input. Torchrun ends the others when rank 0 has printed the message.
        time.sleep(USER_ERROR_DELAY)
    failure.show(world_size=group.world_size)
    failure.record()
    return failure.exit_code


def outside_group(environment: Mapping[str, str]) -> Group | None:
    """Return the process group that the variables of torchrun, else of SLURM's ``srun``, describe, or None."""
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
    """Return how many ranks `launch` starts on this machine: `nproc_per_node`, else one per GPU, else one."""
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
    """Set the variables that torchrun would have set, and restore them afterwards."""
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

    # Without this every rank would start one thread per core.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // count)))
    _silence_agent()
    handlers = {number: signal.getsignal(number) for number in HANDLED_SIGNALS}
    job = pickle.dumps((sys.path, entry, pickle.dumps(args), os.getpid()))
    with _job_directory(job) as directory:
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
            signals_to_handle="SIGINT,SIGHUP,SIGQUIT",
        )
        _pass_on_termination(directory, count)
        try:
            elastic_launch(config, sys.executable)("-u", "-c", RANK_PROGRAM, str(directory))
            return 0
        except ChildFailedError as error:
            exit_codes = {rank: failure.exitcode for rank, failure in error.failures.items()}
            return _report_failure(directory, exit_codes, count)
        except SignalException as error:
            return _interrupted(signal.Signals(error.sigval))
        except KeyboardInterrupt:  # before the agent installed its handlers
            return _interrupted(signal.SIGINT)
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)


@contextlib.contextmanager
def _job_directory(job: bytes) -> Iterator[Path]:
    """Make a temporary directory with `job` in its file ``job``, and remove those of launchers that were killed.

    A launcher holds the lock of its ``job`` as long as it lives.
    """
    for old in Path(tempfile.gettempdir()).glob(f"{DIRECTORY_PREFIX}*/job"):
        # Not ours, removed just now, not yet written, or in use.
        with contextlib.suppress(OSError), old.open("rb") as file:
            if os.fstat(file.fileno()).st_size:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(old.parent)
    with tempfile.TemporaryDirectory(prefix=DIRECTORY_PREFIX) as name, (Path(name) / "job").open("wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.write(job)
        file.flush()
        yield Path(name)


def _pass_on_termination(directory: Path, count: int) -> None:
    """On SIGTERM, ask all ranks to save and end; end at once if one cannot save yet, or on a second SIGTERM."""
    from torch.distributed.elastic.multiprocessing.api import SignalException

    asked = False

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        ranks = [int(path.read_text() or 0) for path in directory.rglob(PREEMPTIBLE_FILE)]
        at_once = asked or len(ranks) < count or 0 in ranks
        asked = True
        for process in filter(None, ranks):
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL if at_once else signal.SIGUSR1)
        if at_once:
            raise SignalException("terminated", signal.SIGTERM)

    signal.signal(signal.SIGTERM, handle)


def _silence_agent() -> None:
    """Silence the agent's own report of a failure, which repeats ours in the agent's terms, unless LOGLEVEL is set."""
    if "LOGLEVEL" not in os.environ:
        for name in list(logging.root.manager.loggerDict):  # each sets its own level, so their parent's has no effect
            if name.startswith(("torch.distributed.elastic", "torch.distributed.launcher")):
                logging.getLogger(name).setLevel(logging.CRITICAL)


def _interrupted(number: signal.Signals) -> int:
    Console(stderr=True).show_cursor()  # which a rank that ended inside a progress display has hidden
    print("interrupted" if number == signal.SIGINT else f"ended by {number.name}", file=sys.stderr)
    return 128 + number


def _report_failure(directory: Path, exit_codes: dict[int, int], count: int) -> int:
    """Print the failure that happened first, of which all others follow, and return the exit code of the run."""
    Console(stderr=True).show_cursor()
    if RESUMABLE in exit_codes.values():
        return RESUMABLE
    if 128 + signal.SIGTERM in exit_codes.values():  # a rank has said why
        return 128 + signal.SIGTERM
    # Also of ranks that were still exiting when the agent looked.
    failures = sorted(map(Failure.read, directory.rglob("error.json")), key=lambda it: it.time)
    # A rank that a signal ended could not write a file, and the errors of its peers only say that it is gone.
    killed = {
        rank: signal.Signals(-code)
        for rank, code in exit_codes.items()
        if code < 0 and -code not in (signal.SIGTERM, signal.SIGINT, signal.SIGABRT)
    }
    if failures:
        failures[0].show(world_size=count)
        if not killed or failures[0].exit_code == USER_ERROR:
            return failures[0].exit_code
    for rank, number in killed.items():
        hint = " The kernel does this when memory runs out." if number == signal.SIGKILL else ""
        print(f"error: rank {rank} of {count} was ended by {number.name}.{hint}", file=sys.stderr)
    if killed:
        return 1
    rank, code = next((it for it in exit_codes.items() if it[1] > 0), next(iter(exit_codes.items())))
    print(f"error: rank {rank} of {count} ended with exit code {code}.", file=sys.stderr)
    return code if code > 0 else 128 - code
