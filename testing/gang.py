"""Gangs: long-lived gloo worker processes in which tests run module-level functions, one call on every rank.

    def on_rank(shift: int) -> int:
        return torch.distributed.get_rank() + shift

    def test_ranks(gang2: Gang) -> None:
        assert gang2.run(on_rank, 10) == [10, 11]

Importing Megatron takes 10 s or more, so one process imports it, and all workers are forked from that process. Workers
also outlive the tests: a `WorkerPool` starts a worker when a rank is first needed, and gangs of every size share the
workers of the lower ranks (4 processes serve gangs of 2 and of 4). Every call gets a fresh process group. After a
failure the pool ends the workers, and the next call starts new ones.
"""

import atexit
import contextlib
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from testing import gang_worker

FORK_SERVER = multiprocessing.get_context("forkserver")
FORK_SERVER.set_forkserver_preload(["testing.gang_preload"])
# The time to import the test file, and with it Megatron, does not count as time of the call.
IMPORT_TIMEOUT = 300.0
# After one rank failed, the others have this long to fail with a message of their own.
GRACE = 2.0
DUMP_TIME = 0.5


class GangError(AssertionError):
    """A call failed on some rank. The text contains the traceback and the output of every rank."""


class Worker:
    """One worker process: its pipe, its log file with stdout and stderr, and its state in the current call."""

    def __init__(self, rank: int, directory: Path) -> None:
        self.rank = rank
        self.log = directory / f"rank_{rank}_{time.monotonic_ns()}.log"
        self.log_offset = 0
        self.log.touch()
        self.connection, child_connection = FORK_SERVER.Pipe()
        # Only this process has the write end, so the pipe closes when this process ends.
        lifeline_read, self._lifeline = FORK_SERVER.Pipe(duplex=False)
        arguments = (child_connection, lifeline_read, str(self.log))
        self.process = FORK_SERVER.Process(target=gang_worker.main, args=arguments)
        self.process.start()
        child_connection.close()
        lifeline_read.close()

    @property
    def running(self) -> bool:
        return self.process.is_alive()

    def output(self) -> str:
        """Return the output of the worker since the current call began."""
        with self.log.open("rb") as log:
            log.seek(self.log_offset)
            return log.read().decode(errors="replace").strip()

    def end(self) -> None:
        assert self.process.pid is not None
        self.process.kill()
        with contextlib.suppress(ProcessLookupError):  # children of the worker
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.join()
        self.connection.close()
        self._lifeline.close()


class WorkerPool:
    """Workers by rank, each started on first use."""

    def __init__(self) -> None:
        self._directory = tempfile.TemporaryDirectory(prefix="mbridge-gang-")
        self._workers: dict[int, Worker] = {}
        self._calls = 0
        atexit.register(self.close)

    def workers(self, world_size: int) -> list[Worker]:
        for rank in range(world_size):
            worker = self._workers.get(rank)
            if worker is not None and not worker.running:
                self.end([worker])
            if rank not in self._workers:
                self._workers[rank] = Worker(rank, Path(self._directory.name))
        return [self._workers[rank] for rank in range(world_size)]

    def new_store(self) -> str:
        self._calls += 1
        return str(Path(self._directory.name) / f"store_{self._calls}")

    def end(self, workers: list[Worker]) -> None:
        for worker in workers:
            worker.end()
            self._workers.pop(worker.rank, None)

    def close(self) -> None:
        """End every worker and remove the log files. Idempotent."""
        self.end(list(self._workers.values()))
        self._directory.cleanup()
        atexit.unregister(self.close)


class Gang:
    """The lowest `world_size` ranks of a pool."""

    def __init__(self, world_size: int, pool: WorkerPool) -> None:
        self.world_size = world_size
        self._pool = pool

    def run(self, function: Callable[..., Any], *args: Any, timeout: float = 300.0, **kwargs: Any) -> list[Any]:
        """Call `function(*args, **kwargs)` on all ranks concurrently and return the results by rank.

        Args:
            function: defined at the top level of a test file or another importable module, because workers find it by
                name. Gloo is initialized before the call, and every process group is destroyed after it.
            timeout: seconds that the call may take after the function's module is imported on every rank.
            args, kwargs: pickled, as are the results, which should be small.

        Raises:
            GangError: a rank raised, ended, or exceeded the timeout.
        """
        module = sys.modules[function.__module__]
        if "<" in function.__qualname__ or module.__file__ is None:
            raise TypeError(f"{function.__qualname__} has no name that a worker can find: move it to the top level")
        workers = self._pool.workers(self.world_size)
        store_path = self._pool.new_store()
        try:
            for worker in workers:
                worker.log_offset = worker.log.stat().st_size
                case = dict(
                    module_name=function.__module__,
                    path=module.__file__,
                    function_name=function.__qualname__,
                    arguments=pickle.dumps((args, kwargs)),
                    rank=worker.rank,
                    world_size=self.world_size,
                    store_path=store_path,
                    timeout=timeout,
                    search_path=sys.path,
                )
                with contextlib.suppress(BrokenPipeError):  # `_collect` reports a worker that has ended
                    worker.connection.send_bytes(pickle.dumps(case))
            results = _collect(workers, timeout, f"{function.__name__} on {self.world_size} ranks")
        except BaseException:  # Ctrl-C and pytest-timeout also leave the ranks in the middle of a call
            self._pool.end(workers)
            raise
        for worker in workers:
            if output := worker.output():
                print(f"[rank {worker.rank}]\n{output}")
        return results


def _collect(workers: list[Worker], timeout: float, title: str) -> list[Any]:
    """Wait for the answers of all ranks; on a failure, gather the tracebacks of all ranks."""
    results: dict[int, Any] = {}
    failures: dict[int, str] = {}
    importing = {worker.rank for worker in workers}
    deadline = time.monotonic() + IMPORT_TIMEOUT
    reason = ""
    while pending := [w for w in workers if w.rank not in results and w.rank not in failures]:
        ready = _ready(pending, deadline - time.monotonic())
        if not ready:
            reason = reason or (
                f"rank {_ranks(importing)} did not import the test file in {IMPORT_TIMEOUT:.0f} s"
                if importing
                else f"not done in {timeout:.0f} s: rank {_ranks(w.rank for w in pending)}"
            )
            break
        for worker in ready:
            kind, value = _receive(worker)
            if kind == "started":
                importing.discard(worker.rank)
                if not importing and not failures:
                    deadline = time.monotonic() + timeout
            elif kind == "returned":
                results[worker.rank] = value
            else:
                importing.discard(worker.rank)
                failures[worker.rank] = value
                deadline = min(deadline, time.monotonic() + GRACE)
    if not failures and not reason:
        return [results[worker.rank] for worker in workers]
    if failures:
        reason = f"rank {_ranks(failures)} failed"
    raise GangError(f"{title}: {reason}\n" + "\n".join(_report(workers, results, failures)))


def _ready(pending: list[Worker], seconds: float) -> list[Worker]:
    """Return the workers that have answered or ended."""
    ready = wait([worker.connection for worker in pending], max(seconds, 0))
    return [worker for worker in pending if worker.connection in ready]


def _receive(worker: Worker) -> tuple[str, Any]:
    connection: Connection = worker.connection
    try:
        kind, value = pickle.loads(connection.recv_bytes())
        return (kind, pickle.loads(value)) if kind == "returned" else (kind, value)
    except (EOFError, ConnectionResetError):
        worker.process.join()
        return "raised", f"the process ended with code {worker.process.exitcode} (negative: signal)"
    except Exception as error:  # noqa: BLE001 - whatever unpickling a result may raise
        return "raised", f"its result cannot be unpickled: {type(error).__name__}: {error}"


def _report(workers: list[Worker], results: dict[int, Any], failures: dict[int, str]) -> Iterator[str]:
    hung = [worker for worker in workers if worker.rank not in results and worker.rank not in failures]
    for worker in hung:
        if worker.running:
            os.kill(worker.process.pid or 0, signal.SIGUSR1)
    if hung:
        time.sleep(DUMP_TIME)
    for worker in workers:
        state = "raised" if worker.rank in failures else "returned" if worker.rank in results else "was still running"
        yield f"\n===== rank {worker.rank} {state} ====="
        if output := worker.output():
            yield f"{output}\n"
        if worker.rank in failures:
            yield failures[worker.rank].rstrip()


def _ranks(ranks: Any) -> str:
    return ", ".join(str(rank) for rank in sorted(ranks))
