"""The process that scores answers: `python -m mbridge_reasoning.rewards.worker FD PARENT`, started by `RewardPool`.

Over the connection with file descriptor FD it receives pickled `WorkerSettings`, then pickled lists of `Answer`, and
replies in JSON: first `{"batched": …}` or `{"error": …}`, then for each list `{"values": …}`, `{"status": …}` or
`{"error": …}`. Pickle goes one way only, from the trainer, which is trusted; replies of a process that
evaluates a model's text are JSON.
"""

import ctypes
import json
import os
import pickle
import resource
import signal
import sys
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

from mbridge_reasoning.errors import RewardError
from mbridge_reasoning.rewards.base import Answer, Scorer, one_by_one
from mbridge_reasoning.rewards.extraction import final_answer

PR_SET_PDEATHSIG = 1  # linux/prctl.h


class WorkerSettings(NamedTuple):
    """The arguments of `RewardPool`. An answer such as 9**9**9**9 exhausts the memory limit and not the machine."""

    timeout: float
    memory_limit: int
    function: str | None
    task: str | None
    parameters: Mapping[str, Any]


class TimeUp(BaseException):
    """The time of an answer is over. Not an `Exception`, so that a library's `except Exception` lets it pass."""


def _raise_time_up(*_: object) -> None:
    raise TimeUp


def main() -> None:
    connection = Connection(int(sys.argv[1]))
    # End with the parent even while busy. The signal comes when the parent's *thread* ends, hence it is set up only
    # together with the end of the connection below, which serves the idle worker.
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(sys.argv[2]):
        return
    for number in (signal.SIGINT, signal.SIGTERM):  # sent to all processes of a job, for the parent to handle
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGALRM, _raise_time_up)
    try:
        settings: WorkerSettings = pickle.loads(connection.recv_bytes())
        resource.setrlimit(resource.RLIMIT_AS, (settings.memory_limit, resource.getrlimit(resource.RLIMIT_AS)[1]))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        scorer = _scorer(connection, settings)
        while scorer is not None:
            answers = pickle.loads(connection.recv_bytes())
            _reply(connection, _score(scorer, answers, settings.timeout))
    except (EOFError, OSError):  # the parent has ended
        return


def _scorer(connection: Connection, settings: WorkerSettings) -> Scorer | None:
    """Import the scorer, which takes seconds, and report success or the reason of the failure."""
    try:
        if settings.function is not None:
            from mbridge_reasoning.rewards.function import function_scorer

            scorer = function_scorer(settings.function)
        elif settings.task is not None:
            from mbridge_reasoning.data.gym import create_task

            task = create_task(settings.task, settings.parameters)

            def score(answer: Answer) -> float:  # what is unfinished counts as no answer
                return float(task.score_answer(final_answer(answer.text) or None, dict(answer.prompt.row)))

            scorer = one_by_one(score)
        else:
            from mbridge_reasoning.rewards.math import math_scorer

            scorer = math_scorer()
    except Exception as error:  # noqa: BLE001 (reported to the parent)
        message = str(error)
        if not isinstance(error, RewardError):
            hint = f"run `{sys.executable} -c 'import math_verify, reasoning_gym'` to see whether its libraries import"
            message = f"a reward worker cannot start: {type(error).__name__}: {error}; {hint}"
        _reply(connection, {"error": message})
        return None
    _reply(connection, {"batched": scorer.batched})
    return scorer


def _score(scorer: Scorer, answers: Sequence[Answer], timeout: float) -> dict[str, Any]:
    # The alarm stops Python code; the parent kills the process where C code holds on.
    try:
        signal.setitimer(signal.ITIMER_REAL, timeout)
        try:
            return {"values": scorer.score(answers)}
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
    except TimeUp:
        return {"status": "timeout"}
    except RewardError as error:
        return {"error": str(error)}
    except Exception:  # noqa: BLE001
        # An answer that breaks the scorer (recursion, memory, a bug) is not right.
        return {"status": "failed"}


def _reply(connection: Connection, message: dict[str, Any]) -> None:
    connection.send_bytes(json.dumps(message).encode())


if __name__ == "__main__":
    main()
