"""How well the model does on held-out examples: the loss of the right answers, and which choice it finds likeliest.

Each choice is scored as if it were the answer: the sum of the log probabilities of its tokens, the end token included,
and their mean, which does not favour short choices. All sequences of a batch go through the engine as one global
batch, so data-parallel ranks share them.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

import torch
from mbridge_train.data.encode import Encoded
from mbridge_train.data.examples import Example
from mbridge_train.data.images import RowImages
from mbridge_train.engine.batch import Sample
from torch import Tensor

SHOWN = 24
"""Predictions kept to be shown, half of them wrong ones where there are as many."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """An example with the sequences to score.

    Attributes:
        example: what is asked.
        candidates: a sequence for each choice; the right answer's alone, where there are no choices.
        right: which of them has the right answer.
    """

    example: Example
    candidates: list[Encoded]
    right: int

    @property
    def images(self) -> RowImages | None:
        """The images that all candidates share."""
        return self.candidates[0].images


@dataclass(frozen=True, kw_only=True, slots=True)
class Prediction:
    """What the model finds likeliest. `predicted` is None where there are no choices."""

    example: Example
    predicted: str | None

    @property
    def is_right(self) -> bool:
        return self.predicted == self.example.answer


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """`metrics`: `validation/…`. `shown`: the first wrong and right predictions, or the first examples."""

    metrics: dict[str, float]
    shown: list[Prediction]


class _Encoder(Protocol):
    def encode(self, example: Example) -> Encoded: ...

    def encode_choices(self, example: Example) -> list[Encoded]: ...


@dataclass(frozen=True, slots=True)
class QuestionEncoder:
    """Makes a `Question` of an example. Can be pickled if `encoder` can. Raises what `encoder` does."""

    encoder: _Encoder

    def __call__(self, example: Example) -> Question:
        if example.choices is None:
            return Question(example=example, candidates=[self.encoder.encode(example)], right=0)
        right = example.choices.index(example.answer)
        return Question(example=example, candidates=self.encoder.encode_choices(example), right=right)


def as_sample(encoded: Encoded, weights: Tensor) -> Sample:
    """Return an encoded row as a sample of the engine, with float32 [length] weights of the loss of its tokens."""
    return Sample(tokens=encoded.tokens, weights=weights, vision=encoded.images, position_ids=encoded.position_ids)


def evaluate(logprobs: Callable[[list[Sample]], list[Tensor]], batches: Iterable[list[Question]]) -> Evaluation:
    """Score all questions. Collective over all ranks if `logprobs` is.

    Args:
        logprobs: `Engine.logprobs`.
        batches: of questions, the same on every rank.

    Returns:
        `validation/loss` (nats a token of the right answers, over all examples), `validation/examples` and, if there
        are multiple-choice questions, `validation/accuracy` (by the sum) and `validation/accuracy_by_mean`.
    """
    loss, tokens, examples, asked = 0.0, 0, 0, 0
    right = {"accuracy": 0, "accuracy_by_mean": 0}
    shown: dict[bool, list[Prediction]] = {False: [], True: []}
    for questions in batches:
        sequences = [candidate for question in questions for candidate in question.candidates]
        samples = [as_sample(sequence, torch.zeros(len(sequence.tokens))) for sequence in sequences]
        values = iter(zip(sequences, logprobs(samples), strict=True))
        for question in questions:
            # In fp64: the sum over all examples is that of another order of batches.
            answers = [
                value[encoded.trained].double() for encoded, value in (next(values) for _ in question.candidates)
            ]
            loss -= float(answers[question.right].sum())
            tokens += len(answers[question.right])
            examples += 1
            choices = question.example.choices
            predicted = None
            if choices is not None:
                asked += 1
                sums = torch.stack([answer.sum() for answer in answers])
                means = torch.stack([answer.mean() for answer in answers])
                right["accuracy"] += int(sums.argmax()) == question.right
                right["accuracy_by_mean"] += int(means.argmax()) == question.right
                predicted = choices[int(sums.argmax())]
            prediction = Prediction(example=question.example, predicted=predicted)
            if len(shown[prediction.is_right]) < SHOWN:
                shown[prediction.is_right].append(prediction)
    metrics = {"validation/loss": loss / max(1, tokens), "validation/examples": float(examples)}
    metrics |= {f"validation/{name}": count / asked for name, count in right.items() if asked}
    wrong = shown[False][: max(SHOWN // 2, SHOWN - len(shown[True]))]
    return Evaluation(metrics=metrics, shown=[*wrong, *shown[True][: SHOWN - len(wrong)]])
