"""Scores answers in worker processes, so that a scorer that hangs or crashes does not harm the run.

The processes are not those of `concurrent.futures` or `multiprocessing.Pool`, whose spawned children import the
trainer's main module with torch, cannot be killed one by one, and send replies that are unpickled. Threads of the
trainer wait for the workers, so that answers are scored while others are still generated.
"""

import json
import os
import pickle
import subprocess
import sys
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from queue import SimpleQueue
from threading import Event
from typing import Any, Self

from mbridge_config import ReasoningConfig

from mbridge_reasoning.errors import RewardError
from mbridge_reasoning.rewards.base import Answer, Score
from mbridge_reasoning.rewards.worker import WorkerSettings

START_LIMIT = 600.0
"""Seconds a worker may take to import its libraries."""

GRACE = 1.0
"""Seconds after the time limit within which a worker may still report the timeout itself; then it is killed."""

BATCH = 64
"""The largest number of answers that a batched function is given at once."""


class RewardPool:
    """Scores answers in `workers` persistent processes.

    Answers are scored by the user's `function`, else by the scorer of the reasoning-gym `task`, else by math-verify.
    The processes start at once and in the background, so make the pool early. Close it, or leave its `with` block.
    `timeout` is in seconds, for one answer or one call of a batched function; `memory_limit` is in bytes of address
    space of a process.
    """

    def __init__(
        self,
        *,
        timeout: float,
        memory_limit: int = 8 * 2**30,
        workers: int = 1,
        function: str | None = None,
        task: str | None = None,
        parameters: Mapping[str, Any] | None = None,
    ) -> None:
        if not timeout > 0:
            raise RewardError(f"reward.timeout is {timeout}: set it above 0 seconds")
        if workers < 1:
            raise RewardError(f"the reward pool has {workers} workers: it needs at least 1")
        settings = WorkerSettings(timeout, memory_limit, function, task, dict(parameters or {}))
        self._closed = Event()
        self._workers = [_Worker(settings, self._closed) for _ in range(workers)]
        self._idle: SimpleQueue[_Worker] = SimpleQueue()
        for worker in self._workers:
            self._idle.put(worker)
        self._waiting: deque[tuple[Answer, Future[Score]]] = deque()
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix="reward")
        self._failure: BaseException | None = None

    @classmethod
    def of(cls, config: ReasoningConfig) -> Self:
        """Make the pool that `reward` asks for. `reward.function` takes precedence over `reward.reward_type`."""
        reward, gym = config.reward, config.data.reasoning_gym
        uses_gym = reward.function is None and reward.reward_type == "reasoning_gym"
        return cls(
            timeout=reward.timeout,
            memory_limit=int(reward.memory_limit * 2**30),
            function=reward.function,
            task=gym.task if uses_gym else None,
            parameters=gym.parameters if uses_gym else None,
        )

    def submit(self, answer: Answer) -> Future[Score]:
        """Have `answer` scored in the background.

        The result raises `RewardError` if no worker can start, or if the user's function is broken.
        """
        future: Future[Score] = Future()
        self._waiting.append((answer, future))
        self._threads.submit(self._serve)
        return future

    def score(self, answers: Sequence[Answer]) -> list[Score]:
        """Score `answers`, in their order. Raises what the results of `submit` raise."""
        return [future.result() for future in [self.submit(answer) for answer in answers]]

    def wait_until_ready(self) -> None:
        """Raise `RewardError` if a worker cannot start."""
        for worker in self._workers:
            worker.ensure_ready()

    def close(self) -> None:
        """End all workers, also those that hang."""
        self._closed.set()
        self._threads.shutdown(wait=False, cancel_futures=True)
        for _ in range(2):  # the second time for a worker that a thread was just restarting
            for worker in self._workers:
                worker.kill()
            self._threads.shutdown(wait=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _serve(self) -> None:
        """Score as many waiting answers as one worker takes at once; none if other threads have taken them all."""
        worker = self._idle.get()
        taken: list[tuple[Answer, Future[Score]]] = []
        try:
            if self._failure is None:
                worker.ensure_ready()
            taken = self._take(BATCH if worker.batched else 1)
            if self._failure is not None:
                raise self._failure
            scores = self._scores(worker, [answer for answer, _ in taken]) if taken else []
            for (_, future), score in zip(taken, scores, strict=True):
                future.set_result(score)
        except BaseException as error:  # noqa: BLE001 (raised again where the result is asked for)
            self._failure = error  # the waiting answers would fail as well
            for _, future in taken or self._take(1):
                future.set_exception(error)
        finally:
            self._idle.put(worker)

    def _take(self, most: int) -> list[tuple[Answer, Future[Score]]]:
        taken: list[tuple[Answer, Future[Score]]] = []
        with suppress(IndexError):
            while len(taken) < most:
                taken.append(self._waiting.popleft())
        return taken

    def _scores(self, worker: "_Worker", answers: list[Answer]) -> list[Score]:
        reply = worker.ask(answers)
        if reply is None and len(answers) == 1:
            # Killed from outside, perhaps: only an answer that does it twice is to blame.
            reply = worker.ask(answers)
        if reply is not None and "values" in reply:
            return [Score(value) for value in reply["values"]]
        if len(answers) > 1:  # one of them is to blame
            return [score for answer in answers for score in self._scores(worker, [answer])]
        return [Score(0.0, "failed" if reply is None else reply["status"])]


class _Worker:
    """One worker process and the connection to it. Used by one thread at a time."""

    def __init__(self, settings: WorkerSettings, closed: Event) -> None:
        self._settings = settings
        self._closed = closed
        self.batched = False  # known once it is ready
        self._ready = False
        self._start()

    def ensure_ready(self) -> None:
        """Wait until the worker has imported what it needs. Raises `RewardError` if it cannot."""
        # Killed from outside, perhaps: only ending twice is its own fault.
        for _ in range(2):
            if self._ready:
                return
            try:
                message = self._receive(START_LIMIT)
            except TimeoutError:
                break
            if message is None:
                self._restart()
            elif "error" in message:
                raise RewardError(message["error"])
            else:
                self.batched = message["batched"]
                self._ready = True
        if not self._ready:
            raise RewardError(
                f"a reward worker cannot start: it ended or took more than {START_LIMIT:.0f} seconds to start; "
                f"run `{sys.executable} -c 'import math_verify, reasoning_gym'` to see whether its libraries import"
            )

    def ask(self, answers: list[Answer]) -> dict[str, Any] | None:
        """Have `answers` scored; return `values` or a `status`, or None if the worker died.

        A worker that hangs or dies is replaced.
        """
        self.ensure_ready()
        request = pickle.dumps(answers)
        try:
            self._connection.send_bytes(request)
        except OSError:  # it died while idle
            self._restart()
            self.ensure_ready()
            self._connection.send_bytes(request)
        try:
            message = self._receive(self._settings.timeout + GRACE)
        except TimeoutError:
            self._restart()
            return {"status": "timeout"}
        if message is None:
            self._restart()
        elif "error" in message:
            raise RewardError(message["error"])
        return message

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    def _receive(self, limit: float) -> dict[str, Any] | None:
        """Return the next message, or None if the process has ended. Raises `TimeoutError` after `limit` seconds."""
        try:
            if not self._connection.poll(limit):
                raise TimeoutError
            message: dict[str, Any] = json.loads(self._connection.recv_bytes())
        except (EOFError, ConnectionError):
            return None
        return message

    def _start(self) -> None:
        self._ready = False
        self._connection: Connection
        self._connection, theirs = Pipe()
        # -P, lest a file in the working directory stand in for a library.
        words = [sys.executable, "-P", "-W", "ignore", "-m", "mbridge_reasoning.rewards.worker"]
        self._process = subprocess.Popen(
            [*words, str(theirs.fileno()), str(os.getpid())],
            stdin=subprocess.DEVNULL,
            stdout=2,  # what a scorer prints is no output of the run
            pass_fds=[theirs.fileno()],
            env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MPLBACKEND": "Agg"},
        )
        theirs.close()
        self._connection.send_bytes(pickle.dumps(self._settings))

    def _restart(self) -> None:
        self.kill()
        self._connection.close()
        if self._closed.is_set():
            raise RewardError("the reward pool was closed while it scored")
        self._start()
