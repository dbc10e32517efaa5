"""Prompts made by a reasoning-gym task, with the validation problems held out of training.

Some tasks choose from sets of texts, whose order differs between Python processes unless `PYTHONHASHSEED` is set before
they start. So the prompts are made in a separate process: `python -m mbridge_reasoning.data.gym`. It is trusted (no
words of a model reach it), so pickle goes both ways. Importing reasoning-gym takes seconds; only functions do.
"""

import difflib
import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from mbridge_train.data.errors import DataError

from mbridge_reasoning.data.prompts import Prompt

if TYPE_CHECKING:
    from reasoning_gym.dataset import ProceduralDataset

PATIENCE = 2000
"""The number of draws without a new question after which a task counts as exhausted."""


def make_prompts(
    task: str, *, train_size: int, validation_size: int, seed: int, parameters: Mapping[str, Any] | None = None
) -> tuple[list[Prompt], list[Prompt]]:
    """Make `train_size` and `validation_size` prompts of a reasoning-gym task: (training, validation).

    No question occurs twice, neither within a set nor in both. Equal arguments give equal prompts, in any process, and
    a larger training set does not change the validation prompts. Raises `DataError` if the task is unknown, refuses the
    parameters, has too few different questions with them, or fails.
    """
    command = [sys.executable, "-W", "ignore", "-m", "mbridge_reasoning.data.gym"]
    arguments = (task, train_size, validation_size, seed, dict(parameters or {}))
    environment = {**os.environ, "PYTHONHASHSEED": "0"}
    done = subprocess.run(command, input=pickle.dumps(arguments), stdout=subprocess.PIPE, env=environment, check=False)
    if done.returncode:
        raise DataError(
            f"reasoning-gym task {task!r} ended with status {done.returncode} while it made problems, see above; "
            "correct data.reasoning_gym.parameters, or choose another data.reasoning_gym.task"
        )
    made: tuple[list[Prompt], list[Prompt]] | DataError = pickle.loads(done.stdout)
    if isinstance(made, DataError):
        raise made
    return made


def _make_prompts(
    task: str, train_size: int, validation_size: int, seed: int, parameters: Mapping[str, Any]
) -> tuple[list[Prompt], list[Prompt]]:
    # Items are drawn with seed + index, so data sets of neighbouring seeds overlap; one data set serves for both.
    dataset = create_task(task, {**parameters, "seed": seed * 1_000_003, "size": 2**40})
    wanted = validation_size + train_size
    prompts: dict[str, Prompt] = {}
    index = last_new = 0
    while len(prompts) < wanted:
        entry = dataset[index]
        question = entry["question"]
        if question not in prompts:
            prompts[question] = Prompt(
                content=question, solutions=(str(entry["answer"]),), source=f"{task}, item {index}", row=entry
            )
            last_new = index
        elif index - last_new > PATIENCE:
            raise DataError(
                f"reasoning-gym task {task!r} has only about {len(prompts)} different questions with these "
                f"parameters, {wanted} are wanted (data.reasoning_gym.train_size={train_size} and "
                f"validation_size={validation_size}): lower these, or widen data.reasoning_gym.parameters"
            )
        index += 1
    ordered = list(prompts.values())
    return ordered[validation_size:], ordered[:validation_size]


def create_task(task: str | None, parameters: Mapping[str, Any]) -> "ProceduralDataset":
    """Create the data set of a reasoning-gym task, which also scores answers to it, or raise `DataError`."""
    import reasoning_gym
    from reasoning_gym.factory import DATASETS

    if task not in DATASETS:
        near = difflib.get_close_matches(str(task), DATASETS, n=3, cutoff=0.4)
        raise DataError(
            f"data.reasoning_gym.task={task!r} is not a reasoning-gym task: "
            + (f"did you mean {' or '.join(map(repr, near))}?" if near else "see reasoning_gym.factory.DATASETS")
        )
    try:
        return reasoning_gym.create_dataset(task, **parameters)
    except (TypeError, ValueError, AssertionError) as error:
        raise DataError(
            f"reasoning-gym task {task!r} refuses data.reasoning_gym.parameters={dict(parameters)}: {error}"
        ) from None


def main() -> None:
    """Make prompts from the pickled arguments on stdin; write them, or the `DataError`, pickled to stdout."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    reply = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # a task's print must not end up in the reply
    made: tuple[list[Prompt], list[Prompt]] | DataError
    try:
        made = _make_prompts(*pickle.load(sys.stdin.buffer))
    except DataError as error:
        made = error
    with reply:
        pickle.dump(made, reply)


if __name__ == "__main__":
    main()
