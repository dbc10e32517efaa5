"""Processes that read and encode rows, so that the training process does not wait for images.

They come from a fork server, which imports what they need once and has none of the training process's threads, GPU or
Megatron. Each is served by a thread here, which knows what row the process is at should it die.
"""

import io
import multiprocessing
import pickle
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing.connection import Connection
from queue import SimpleQueue
from typing import Any, Self, cast

import torch

from mbridge_train.data.errors import DataError, RowError
from mbridge_train.data.examples import Example, Examples

JOIN_SECONDS = 5.0
"""How long a worker may take to end by itself."""


def encode_row[T](examples: Examples, encode: Callable[[Example], T], row: int) -> T | RowError:
    """`encode(examples[row])`, or the error of a bad row. Raises `DataError` for anything else that goes wrong."""
    try:
        return encode(examples[row])
    except RowError as error:
        return error
    except DataError:
        raise
    except Exception as error:
        raise DataError(f"{examples.source(row)}: cannot be encoded: {type(error).__name__}: {error}") from error


class WorkerPool[T]:
    """`workers` processes that map rows to `encode_row(examples, encode, row)`.

    The module of `encode` is imported in them, so it should not import what only training needs.
    """

    def __init__(self, examples: Examples, encode: Callable[[Example], T], workers: int) -> None:
        self._examples = examples
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([__name__, encode.__module__])
        self._workers = [_Worker(context, examples, encode) for _ in range(workers)]
        self._idle: SimpleQueue[_Worker] = SimpleQueue()
        for worker in self._workers:
            self._idle.put(worker)
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix="decoding")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._workers:
            worker.process.terminate()
        self._threads.shutdown(cancel_futures=True)
        for worker in self._workers:
            worker.close()

    def map(self, rows: Iterable[int], ahead: int) -> Iterator[T | RowError]:
        """What becomes of each row, in their order. `ahead` rows are asked for before their turn."""
        waiting: deque[Future[T | RowError]] = deque()
        for row in rows:
            waiting.append(self._threads.submit(self._ask, row))
            if len(waiting) > ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()

    def _ask(self, row: int) -> T | RowError:
        worker = self._idle.get()  # there are as many as threads
        try:
            reply = worker.ask(row, self._examples.source(row))
        finally:
            self._idle.put(worker)
        if isinstance(reply, DataError) and not isinstance(reply, RowError):
            raise reply
        return cast("T | RowError", reply)


class _Worker:
    """One process, asked by one thread at a time."""

    def __init__(self, context: Any, examples: Examples, encode: Callable[[Example], object]) -> None:
        self._connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, examples, encode), name="decoding", daemon=True)
        self.process.start()
        theirs.close()  # so that the process's death ends the connection
        self._death: DataError | None = None

    def ask(self, row: int, source: str) -> object:
        """The reply for a row. Raises `DataError`, with the row that it was at, if the process died."""
        if self._death is not None:
            raise self._death
        try:
            self._connection.send(row)
            return pickle.loads(self._connection.recv_bytes())
        except (EOFError, OSError):
            self.process.join(JOIN_SECONDS)
            code = self.process.exitcode
            how = f"by signal {-code}" if code is not None and code < 0 else f"with exit code {code}"
            self._death = DataError(
                f"{source}: the process that decoded this row ended {how}; if it is always this row, its image "
                "crashes the decoder: take it out; by signal 9, the memory may be too small: lower data.num_workers"
            )
            raise self._death from None

    def close(self) -> None:
        """After `process.terminate()`."""
        self.process.join(JOIN_SECONDS)
        self._connection.close()


class _TensorPickler(pickle.Pickler):
    """Tensors as NumPy arrays: torch's own way goes through a file, or through shared memory that can run out."""

    def reducer_override(self, value: Any) -> Any:
        return (torch.from_numpy, (value.numpy(),)) if type(value) is torch.Tensor else NotImplemented


def _serve(connection: Connection, examples: Examples, encode: Callable[[Example], object]) -> None:
    """A worker: rows come in, what becomes of them goes out, until the training process closes or dies."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the training process's to handle
    torch.set_num_threads(1)
    try:
        while True:
            row = connection.recv()
            reply: object
            try:
                reply = encode_row(examples, encode, row)
            except DataError as error:
                reply = error
            buffer = io.BytesIO()
            _TensorPickler(buffer, protocol=5).dump(reply)
            connection.send_bytes(buffer.getbuffer())
    except (EOFError, OSError):
        return
