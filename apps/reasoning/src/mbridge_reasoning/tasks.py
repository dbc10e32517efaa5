"""Problems made by a reasoning-gym task, with the validation problems held out of training.

reasoning-gym takes seconds to import, so only the functions that need it import it.
"""

import difflib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from mbridge_reasoning.data import Problem
from mbridge_reasoning.errors import DataError

if TYPE_CHECKING:
    from reasoning_gym.dataset import ProceduralDataset

# Draws without a new question after which a task is taken to have no more of them.
PATIENCE = 2000


def make_problems(
    task: str, *, train_size: int, validation_size: int, seed: int, parameters: Mapping[str, Any] | None = None
) -> tuple[list[Problem], list[Problem]]:
    """Make `train_size` and `validation_size` problems of a reasoning-gym task: (training, validation).

    All questions differ from each other, in training, in validation and between the two. Equal arguments give equal
    problems, and more training problems leave the validation problems as they were.

    Raises `DataError` for an unknown task, parameters that the task refuses, and a task that has too few different
    questions with these parameters.
    """
    # Items are drawn with seed + index, so data sets of neighbouring seeds overlap; one data set serves for both.
    dataset = create_task(task, {**(parameters or {}), "seed": seed * 1_000_003, "size": 2**40})
    wanted = validation_size + train_size
    problems: dict[str, Problem] = {}
    index = last_new = 0
    while len(problems) < wanted:
        entry = dataset[index]
        question = entry["question"]
        if question not in problems:
            problems[question] = Problem(
                prompt=question, solutions=(str(entry["answer"]),), source=f"{task}, item {index}", entry=entry
            )
            last_new = index
        elif index - last_new > PATIENCE:
            raise DataError(
                f"reasoning-gym task {task!r} has only about {len(problems)} different questions with these "
                f"parameters, {wanted} are wanted (data.reasoning_gym.train_size={train_size} and "
                f"validation_size={validation_size}): lower these, or widen data.reasoning_gym.parameters"
            )
        index += 1
    ordered = list(problems.values())
    return ordered[validation_size:], ordered[:validation_size]


def create_task(task: str | None, parameters: Mapping[str, Any]) -> "ProceduralDataset":
    """The data set of a reasoning-gym task, which also scores answers to it."""
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
