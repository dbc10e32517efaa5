"""Scores of choices against values computed by hand, and the grid that shows them."""

import io
import math
import pickle
from functools import partial
from typing import cast

import pytest
import torch
from mbridge_sft.display import LONGEST_TEXT, example_grid
from mbridge_sft.evaluation import SHOWN, Question, encode_question, evaluate
from mbridge_sft.trainer import training_samples
from mbridge_train.data.encode import Encoded, Encoder
from mbridge_train.data.examples import Example, ImageReference, Message
from mbridge_train.engine.batch import Sample
from PIL import Image


def example(answer: str, choices: tuple[str, ...] | None, *parts: str | ImageReference) -> Example:
    message = Message(role="user", parts=parts or ("Which?",))
    return Example(messages=(message,), answer=answer, choices=choices, source=f"a.parquet row {answer}")


def encoded(prompt: int, answer: list[int]) -> Encoded:
    """A prompt of this many tokens 1, and an answer."""
    tokens = torch.tensor([1] * prompt + answer)
    trained = torch.arange(len(tokens)) >= prompt
    return Encoded(tokens=tokens, trained=trained, images=None, position_ids=None, source="x")


def question(answer: str, choices: dict[str, list[int]]) -> Question:
    candidates = [encoded(2, tokens) for tokens in choices.values()]
    return Question(example=example(answer, tuple(choices)), candidates=candidates, right=list(choices).index(answer))


def logprobs(batch: list[Sample]) -> list[torch.Tensor]:
    """The logarithm of 1 / token, as if that were the probability of each token."""
    assert all(not sample.weights.any() for sample in batch)
    return [-torch.log(sample.tokens.float()) for sample in batch]


def test_scores_by_sum_and_by_mean() -> None:
    # Probabilities 1/3 and 1/2 * 1/2 = 1/4: the first by the sum; by the mean 1/3 and 1/2, the second.
    one = question("short", {"short": [3], "long": [2, 2]})
    two = question("long", {"short": [3], "long": [2, 2]})
    result = evaluate(logprobs, [[one, two]])
    assert result.metrics["validation/accuracy"] == 0.5
    assert result.metrics["validation/accuracy_by_mean"] == 0.5
    assert [(shown.predicted, shown.is_right) for shown in result.shown] == [("short", False), ("short", True)]
    metrics = evaluate(logprobs, [[question("short", {"short": [3], "long": [2, 2]})]]).metrics
    assert (metrics["validation/accuracy"], metrics["validation/accuracy_by_mean"]) == (1.0, 0.0)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_loss_is_the_mean_over_all_tokens_of_right_answers(size: int) -> None:
    questions = [
        question("a", {"a": [5], "b": [2]}),
        question("b", {"a": [5], "b": [2, 3]}),
        Question(example=example("free", None), candidates=[encoded(1, [7, 7, 7])], right=0),
    ]
    batches = [questions[start : start + size] for start in range(0, 3, size)]
    metrics = evaluate(logprobs, batches).metrics
    assert metrics["validation/loss"] == pytest.approx(math.log(5 * 2 * 3 * 7**3) / 6, rel=1e-6)
    assert (metrics["validation/examples"], metrics["validation/accuracy"]) == (3, 0.0)


def test_without_choices_there_is_no_accuracy() -> None:
    free = Question(example=example("free", None), candidates=[encoded(1, [7])], right=0)
    result = evaluate(logprobs, [[free]])
    assert result.metrics.keys() == {"validation/loss", "validation/examples"}
    assert result.shown[0].predicted is None and "prediction" not in example_grid(result.shown)


@pytest.mark.parametrize(("wrong", "right", "expected"), [(40, 40, 12), (3, 40, 3), (40, 5, 19), (2, 2, 2)])
def test_wrong_predictions_are_shown_first(wrong: int, right: int, expected: int) -> None:
    questions = [question("a", {"a": [2], "b": [3]})] * right + [question("b", {"a": [2], "b": [3]})] * wrong
    shown = evaluate(logprobs, [questions]).shown
    assert len(shown) == min(SHOWN, wrong + right)
    assert [prediction.is_right for prediction in shown] == [False] * expected + [True] * (len(shown) - expected)


class _Encoder:
    def encode(self, example: Example) -> Encoded:
        return encoded(1, [ord(example.answer)])

    def encode_choices(self, example: Example) -> list[Encoded]:
        return [encoded(1, [ord(choice)]) for choice in example.choices or ()]


def test_questions_of_examples() -> None:
    make = pickle.loads(pickle.dumps(partial(encode_question, cast(Encoder, _Encoder()))))
    made = make(example("b", ("a", "b", "c")))
    assert made.right == 1 and [int(candidate.tokens[1]) for candidate in made.candidates] == [97, 98, 99]
    made = make(example("z", None))
    assert made.right == 0 and [int(candidate.tokens[1]) for candidate in made.candidates] == [122]


def test_every_trained_token_of_the_batch_counts_the_same() -> None:
    samples = training_samples([encoded(3, [4]), encoded(1, [5, 6, 7])])
    assert [sample.weights.tolist() for sample in samples] == [[0, 0, 0, 0.25], [0, 0.25, 0.25, 0.25]]


def test_grid_holds_all_it_shows() -> None:
    picture = io.BytesIO()
    Image.new("RGB", (500, 250), "red").save(picture, format="JPEG")
    asked = example("<a>", ("<a>", "b"), ImageReference(data=picture.getvalue()), "Is it & how? " + "x" * 1000)
    grid = example_grid(
        evaluate(logprobs, [[Question(example=asked, candidates=[encoded(1, [2]), encoded(1, [3])], right=0)]]).shown
    )
    assert "&lt;a&gt;" in grid and "<a>" not in grid and "Is it &amp; how?" in grid
    assert "x" * LONGEST_TEXT not in grid
    assert grid.count("data:image/png;base64,") == 1 and "http" not in grid
    assert example_grid([]) == ""


def test_grid_survives_an_image_that_is_gone() -> None:
    asked = example("a", ("a", "b"), ImageReference(location="/nowhere.png"), "Which?")
    shown = evaluate(
        logprobs, [[Question(example=asked, candidates=[encoded(1, [2]), encoded(1, [3])], right=0)]]
    ).shown
    assert "cannot be read" in example_grid(shown)
