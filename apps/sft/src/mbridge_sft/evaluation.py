"""Evaluating the model on held-out examples: the loss of the right answers, and the choice that it finds likeliest.

Each choice is scored as if it were the answer: by the sum of the log-probabilities of its tokens, end token included,
and by their mean, which does not favor short choices. All sequences of a batch go through the engine as one global
batch, so data-parallel ranks share the work.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from mbridge_train.data.encode import Encoded, Encoder
from mbridge_train.data.examples import Example
from mbridge_train.data.images import RowImages
from mbridge_train.engine.batch import Sample
from torch import Tensor

SHOWN = 24
"""Predictions kept for the report, half of them wrong if there are that many."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """An example with a sequence to score for each choice, or only that of the right answer if there are no choices."""

    example: Example
    candidates: list[Encoded]
    right: int
    """Index of the candidate with the right answer."""

    @property
    def images(self) -> RowImages | None:
        """The images that all candidates share."""
        return self.candidates[0].images


@dataclass(frozen=True, kw_only=True, slots=True)
class Prediction:
    """The choice that the model finds likeliest. `predicted` is None if there are no choices."""

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


def encode_question(encoder: Encoder, example: Example) -> Question:
    """Return an example with its sequences. Raises what `encoder` raises."""
    if example.choices is None:
        return Question(example=example, candidates=[encoder.encode(example)], right=0)
    right = example.choices.index(example.answer)
    return Question(example=example, candidates=encoder.encode_choices(example), right=right)


def as_sample(encoded: Encoded, weights: Tensor) -> Sample:
    """Return an encoded row as a sample of the engine. `weights`: float32 [length], of each token's loss."""
    return Sample(tokens=encoded.tokens, weights=weights, vision=encoded.images, position_ids=encoded.position_ids)


def evaluate(logprobs: Callable[[list[Sample]], list[Tensor]], batches: Iterable[list[Question]]) -> Evaluation:
    """Score all questions. Collective over all ranks if `logprobs` is.

    Args:
        batches: of questions, the same on every rank.

    Returns:
        `validation/loss` (nats per token of the right answers, over all examples), `validation/examples` and, if there
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
            # In fp64, so that the sum over all examples does not depend on the batches.
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
