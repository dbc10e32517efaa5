"""The process that scores answers: `python -m mbridge_reasoning.rewards.worker`, started by `reward.RewardPool`.

Reads pickled (text, solutions, entry) tuples from its parent on stdin, and writes one JSON object a line: first
`{"ready": true}` or `{"error": …}`, then `{"value": …, "status": …}` for each answer. Pickle goes one way only, from
the trainer, which is trusted; what comes back from evaluating a model's words is JSON.
"""

import ctypes
import json
import os
import pickle
import resource
import signal
import sys
from types import FrameType
from typing import Any

MEMORY_LIMIT = 8 * 2**30
"""Bytes of address space: an answer such as 9**9**9**9 fails here and not on the whole machine."""

PR_SET_PDEATHSIG = 1


class TimeUp(BaseException):
    """The time of an answer is over. Not an `Exception`, so that a library's `except Exception` lets it pass."""


def _raise_time_up(signal_number: int, frame: FrameType | None) -> None:
    raise TimeUp


def main() -> None:
    settings = json.loads(sys.argv[1])
    # Ends with the parent even while busy. The signal comes when the parent's *thread* ends, hence from Linux's prctl
    # only together with the end of stdin below, which serves the idle worker.
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != settings["parent"]:
        return
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    signal.signal(signal.SIGALRM, _raise_time_up)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT, resource.getrlimit(resource.RLIMIT_AS)[1]))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    requests = sys.stdin.buffer
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # a library's print must not end up between the replies

    def reply(message: dict[str, Any]) -> None:
        replies.write(json.dumps(message) + "\n")
        replies.flush()

    try:
        # Imported here, because it takes seconds and its failure is to be reported.
        from mbridge_reasoning.rewards.scoring import math_scorer, task_scorer

        task = settings["task"]
        scorer = math_scorer() if task is None else task_scorer(task, settings["parameters"])
    except Exception as error:  # noqa: BLE001 (reported to the parent)
        reply({"error": f"{type(error).__name__}: {error}"})
        return
    reply({"ready": True})
    while True:
        try:
            text, solutions, entry = pickle.load(requests)
        except EOFError:
            return
        # Stops Python code; the parent kills the process where C code holds on.
        try:
            signal.setitimer(signal.ITIMER_REAL, settings["timeout"])
            try:
                value, status = scorer(text, solutions, entry), "scored"
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
        except TimeUp:
            value, status = 0.0, "timeout"
        except Exception:  # noqa: BLE001
            # Whatever breaks the verifier (recursion, memory, a bug of its own) is not a right answer.
            value, status = 0.0, "failed"
        reply({"value": value, "status": status})


if __name__ == "__main__":
    main()
