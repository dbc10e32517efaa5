"""Worker processes that encode rows and decode images, so that the training process waits for neither.

They are forked from a fork server, which imports their modules once and has none of the training process's threads, GPU
memory or Megatron. Each is served by one thread of the training process, which knows the worker's row if it dies.

Why not torch's `DataLoader`: it has one phase, which builds batches before any plan is known; here, a second phase
decodes the images that the plan assigns to this rank. Its error for a dead worker names the process, ours the row. A
`ProcessPoolExecutor` loses all tasks in flight when one process dies, and names none.
"""

import io
import multiprocessing
import pickle
import signal
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.util import Finalize
from queue import SimpleQueue
from typing import Any, Self

import torch

from mbridge_train.data.errors import DataError

JOIN_SECONDS = 5.0
"""Time that a worker has to exit by itself."""

Tasks = Mapping[str, Callable[[Any], Any]]


class WorkerPool:
    """Worker processes that start tasks in the order of submission.

    Args:
        tasks: functions of one argument by name. They, their arguments and their results can be pickled.
        workers: number of processes; 0 runs each task in this process when it is submitted.
        preload: modules that the fork server imports once for all workers, so without what only training needs.
    """

    def __init__(self, tasks: Tasks, workers: int, *, preload: Sequence[str] = ()) -> None:
        self._tasks = tasks
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([__name__, *preload])
        self._idle: SimpleQueue[_Worker] = SimpleQueue()
        if workers:
            resource_tracker.ensure_running()  # else the first worker starts it, which unblocks SIGTERM
        # SIGTERM may be sent to all processes of a job, to announce its end. It is for the training process to handle,
        # which saves first. The fork server, which the first worker starts, and all workers inherit the mask.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
        self._workers = [_Worker(context, tasks) for _ in range(workers)]
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for worker in self._workers:
            self._idle.put(worker)
        self._threads = ThreadPoolExecutor(max(workers, 1), thread_name_prefix="data worker")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._workers:
            worker.kill()
        self._threads.shutdown(cancel_futures=True)
        for worker in self._workers:
            worker.process.join(JOIN_SECONDS)
            worker.connection.close()

    def submit(self, task: str, argument: Any, source: str) -> Future[Any]:
        """Run a task on `argument`, which belongs to the row `source`.

        The result of the future is the task's or an error: a `RowError` for a bad row, a `DataError` for any other
        failure, the death of the worker included.
        """
        if self._workers:
            return self._threads.submit(self._ask, task, argument, source)
        done: Future[Any] = Future()
        done.set_result(_run(self._tasks, task, argument, source))
        return done

    def _ask(self, *request: Any) -> Any:
        worker = self._idle.get()  # there are as many workers as threads
        try:
            return worker.ask(*request)
        finally:
            self._idle.put(worker)


def _run(tasks: Tasks, task: str, argument: Any, source: str) -> Any:
    try:
        return tasks[task](argument)
    except DataError as error:
        return error
    except Exception as error:  # noqa: BLE001 - the loader raises it when the row's turn comes
        return DataError(f"{source}: cannot be encoded: {type(error).__name__}: {error}")


class _Worker:
    """One process, asked by one thread at a time."""

    def __init__(self, context: Any, tasks: Tasks) -> None:
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, dict(tasks)), name="data worker", daemon=True)
        self.process.start()
        theirs.close()  # so that the process's death ends the connection
        # Also at the end of the interpreter, before multiprocessing sends SIGTERM and waits.
        self.kill = Finalize(self, self.process.kill, exitpriority=1)
        self._death: DataError | None = None

    def ask(self, *request: Any) -> Any:
        """Return the reply to `(task, argument, source)`, or a `DataError` with the row if the process died."""
        if self._death is not None:
            return self._death
        try:
            self.connection.send_bytes(_pickled(request))
            return pickle.loads(self.connection.recv_bytes())
        except (EOFError, OSError):
            self.process.join(JOIN_SECONDS)
            code = self.process.exitcode
            how = f"by signal {-code}" if code is not None and code < 0 else f"with exit code {code}"
            self._death = DataError(
                f"{request[-1]}: the process that decoded this row ended {how}; if it is always this row, its image "
                "crashes the decoder: take it out; by signal 9, the memory may be too small: lower data.num_workers"
            )
            return self._death


class _TensorPickler(pickle.Pickler):
    """Pickles tensors as NumPy arrays: torch's own way needs a file, or shared memory, which can run out."""

    def reducer_override(self, value: Any) -> Any:
        return (torch.from_numpy, (value.numpy(),)) if type(value) is torch.Tensor else NotImplemented


def _pickled(value: Any) -> memoryview:
    buffer = io.BytesIO()
    _TensorPickler(buffer, protocol=5).dump(value)
    return buffer.getbuffer()


def _serve(connection: Connection, tasks: Tasks) -> None:
    """Reply to requests in a worker process until the training process closes the connection or dies."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the training process to handle
    torch.set_num_threads(1)
    try:
        while True:
            request = pickle.loads(connection.recv_bytes())
            connection.send_bytes(_pickled(_run(tasks, *request)))
    except (EOFError, OSError):
        return
