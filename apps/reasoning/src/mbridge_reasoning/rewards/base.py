"""Answers and their scores. Shared by the trainer and the reward workers, so nothing here imports torch."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from mbridge_reasoning.data.prompts import Prompt
from mbridge_reasoning.rollout.base import EndReason


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """The text that the policy wrote, without special tokens, the prompt that it answers, and why it ended."""

    text: str
    prompt: Prompt
    end: EndReason = "end_token"


@dataclass(frozen=True, slots=True)
class Score:
    """The score of an answer: 1.0 if it is right; reasoning-gym tasks and reward functions may give other values."""

    value: float
    status: Literal["scored", "timeout", "failed"] = "scored"
    """The last two have value 0.0. Failed: the scorer raised, ran out of memory, or took its process down twice."""

    @property
    def right(self) -> bool:
        return self.value > 1.0 - 1e-6


class Scorer(NamedTuple):
    """The function that a reward worker runs, which returns one value per answer."""

    score: Callable[[Sequence[Answer]], list[float]]
    batched: bool = False
    """Whether it takes several answers at once."""


def one_by_one(score: Callable[[Answer], float]) -> Scorer:
    """Make a scorer of a function of a single answer."""
    return Scorer(lambda answers: [score(answer) for answer in answers])
