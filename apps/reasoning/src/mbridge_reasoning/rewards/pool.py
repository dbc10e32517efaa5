"""Rewards of answers, from a pool of worker processes that a hanging or crashing verifier cannot take down."""

import atexit
import json
import os
import pickle
import selectors
import subprocess
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from mbridge_reasoning.data.problems import Problem
from mbridge_reasoning.errors import RewardError

START_LIMIT = 600.0
"""Seconds a worker may take to import its libraries."""

GRACE = 1.0
"""Seconds after the time limit in which a worker may still answer for itself; then it is killed."""


@dataclass(frozen=True, slots=True)
class Score:
    """`value`: 1.0 for a right answer; reasoning-gym tasks may give parts of it. `status`: "timeout" and "failed"
    (the verifier raised, or took its process down twice) have value 0.0."""

    value: float
    status: Literal["scored", "timeout", "failed"] = "scored"

    @property
    def right(self) -> bool:
        return self.value > 1.0 - 1e-6


class RewardPool:
    """Scores answers in `workers` persistent processes, each answer within `timeout` seconds.

    Without `task` answers are verified by math-verify against their problem's solutions; with it by the scorer of
    that reasoning-gym task. The processes start at once and in the background, so make the pool early. They do not
    import torch. Use the pool from one thread, and close it (or leave its `with` block).
    """

    def __init__(
        self,
        *,
        timeout: float,
        workers: int = 1,
        task: str | None = None,
        parameters: Mapping[str, Any] | None = None,
    ) -> None:
        if not timeout > 0:
            raise RewardError(f"reward.timeout is {timeout}: set it above 0 seconds")
        if workers < 1:
            raise RewardError(f"the reward pool has {workers} workers: it needs at least 1")
        settings = {"task": task, "parameters": dict(parameters or {}), "timeout": timeout, "parent": os.getpid()}
        self._command = [sys.executable, "-W", "ignore", "-m", "mbridge_reasoning.rewards.worker", json.dumps(settings)]
        self._timeout = timeout
        self._workers = [_Worker(self._command) for _ in range(workers)]
        atexit.register(self.close)

    def score(self, answers: Sequence[tuple[str, Problem]]) -> list[Score]:
        """Score (text, problem) pairs, in their order. Raises `RewardError` if a worker cannot start at all."""
        scores: list[Score | None] = [None] * len(answers)
        waiting = deque(range(len(answers)))
        retried: set[int] = set()
        while waiting or any(worker.busy_with is not None for worker in self._workers):
            for worker in self._workers:
                if worker.ready and worker.busy_with is None and waiting:
                    position = waiting.popleft()
                    text, problem = answers[position]
                    if worker.send((text, problem.solutions, problem.entry)):
                        worker.busy_with = position
                        worker.deadline = time.monotonic() + self._timeout + GRACE
                    else:  # it died while idle
                        waiting.appendleft(position)
                        worker.restart()
            for worker, message in self._wait():
                scored, worker.busy_with = worker.busy_with, None
                if scored is None:
                    self._note_start(worker, message)
                elif message is None:
                    if time.monotonic() >= worker.deadline:
                        scores[scored] = Score(0.0, "timeout")
                    elif scored in retried:
                        scores[scored] = Score(0.0, "failed")
                    else:  # killed from outside, perhaps: only an answer that does it twice is to blame
                        retried.add(scored)
                        waiting.appendleft(scored)
                    worker.restart()
                else:
                    scores[scored] = Score(message["value"], message["status"])
        return [score for score in scores if score is not None]

    def close(self) -> None:
        """End all workers, also those that hang."""
        atexit.unregister(self.close)
        for worker in self._workers:
            worker.kill()

    def __enter__(self) -> "RewardPool":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _wait(self) -> list[tuple["_Worker", dict[str, Any] | None]]:
        """Wait until workers reply, die or pass their deadline: (worker, reply or None)."""
        pending = [worker for worker in self._workers if worker.busy_with is not None or not worker.ready]
        with selectors.DefaultSelector() as selector:
            for worker in pending:
                selector.register(worker.replies, selectors.EVENT_READ, worker)
            limit = max(0.0, min((worker.deadline for worker in pending), default=0.0) - time.monotonic())
            events: list[tuple[_Worker, dict[str, Any] | None]] = [
                (key.data, key.data.receive()) for key, _ in selector.select(limit)
            ]
        answered = {id(worker) for worker, _ in events}
        now = time.monotonic()
        return events + [(w, None) for w in pending if id(w) not in answered and now >= w.deadline]

    def _note_start(self, worker: "_Worker", message: dict[str, Any] | None) -> None:
        if message is not None and message.get("ready"):
            worker.ready = True
            return
        if message is None and not worker.started_again and time.monotonic() < worker.deadline:
            worker.restart(started_again=True)  # killed from outside, perhaps: only dying twice is its own fault
            return
        reason = message["error"] if message else f"it ended or took more than {START_LIMIT:.0f} seconds to start"
        self.close()
        raise RewardError(
            f"a reward worker cannot start: {reason}; "
            f"run `{sys.executable} -c 'import math_verify, reasoning_gym'` to see whether its libraries import"
        )


class _Worker:
    """One worker process and the pipe to it.

    Attributes:
        busy_with: position of the answer it scores, None if idle.
        started_again: the process before this one ended before it was ready.
    """

    def __init__(self, command: list[str]) -> None:
        self._command = command
        self._start(started_again=False)

    def _start(self, started_again: bool) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MPLBACKEND": "Agg"}
        self._process = subprocess.Popen(
            self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, bufsize=0
        )
        assert self._process.stdin and self._process.stdout
        self._requests, self.replies = self._process.stdin, self._process.stdout
        self.ready = False
        self.started_again = started_again
        self.busy_with: int | None = None
        self.deadline = time.monotonic() + START_LIMIT

    def send(self, request: tuple[str, tuple[str, ...], dict[str, Any] | None]) -> bool:
        """False if the process has ended."""
        data = memoryview(pickle.dumps(request))
        try:
            while data:
                data = data[self._requests.write(data) :]
        except BrokenPipeError:
            return False
        return True

    def receive(self) -> dict[str, Any] | None:
        """The reply that is there to be read; None if the process ended instead."""
        line = b""
        while not line.endswith(b"\n"):
            part = self.replies.read(65536)
            if not part:
                return None
            line += part
        message: dict[str, Any] = json.loads(line)
        return message

    def restart(self, started_again: bool = False) -> None:
        self.kill()
        self._start(started_again)

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()
        self._requests.close()
        self.replies.close()
