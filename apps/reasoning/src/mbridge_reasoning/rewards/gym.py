"""Scores answers with the scorer of a reasoning-gym task."""

from collections.abc import Mapping
from typing import Any

from mbridge_reasoning.data.gym import create_task
from mbridge_reasoning.rewards.base import Answer, Scorer, one_by_one
from mbridge_reasoning.rewards.extraction import final_answer


def task_scorer(task: str, parameters: Mapping[str, Any]) -> Scorer:
    """Score final answers as the task does, which may give a part of 1.0. What is unfinished counts as no answer."""
    dataset = create_task(task, parameters)

    def score(answer: Answer) -> float:
        return float(dataset.score_answer(final_answer(answer.text) or None, dict(answer.prompt.row)))

    return one_by_one(score)
