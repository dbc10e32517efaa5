"""From answers to samples and metrics, against values computed by hand."""

import math

import pytest
import torch
from mbridge_reasoning.data.problems import Problem
from mbridge_reasoning.experience import Answer, answer_metrics, make_samples, mismatch_metrics
from mbridge_reasoning.rewards.pool import Score
from mbridge_reasoning.rollout.transformers import Completion


def answer(prompt: int, logprobs: list[float], score: Score | None = None, *, finished: bool = True) -> Answer:
    """An answer of `len(logprobs)` tokens (101, 102, …) to a prompt of `prompt` tokens (1, 2, …)."""
    return Answer(
        problem=Problem(prompt="?", solutions=("1",), source="test", prompt_tokens=tuple(range(1, prompt + 1))),
        completion=Completion(tokens=list(range(101, 101 + len(logprobs))), logprobs=logprobs, finished=finished),
        score=score or Score(1.0),
    )


TWO = [answer(2, [-0.5, -1.0, -0.25]), answer(3, [-2.0])]


def test_samples_train_answers_alone() -> None:
    old = [answer.rollout_logprobs for answer in TWO]
    reference = [logprobs - 1 for logprobs in old]
    samples = make_samples(
        TWO, torch.tensor([0.5, -2.0]), aggregation="token-mean", old_logprobs=old, reference_logprobs=reference
    )
    assert [sample.tokens.tolist() for sample in samples] == [[1, 2, 101, 102, 103], [1, 2, 3, 101]]
    # 4 answer tokens in all, each a quarter of the loss
    assert [sample.weights.tolist() for sample in samples] == [[0, 0, 0.25, 0.25, 0.25], [0, 0, 0, 0.25]]
    assert [sample.fields["advantages"].tolist() for sample in samples] == [
        [0.5] * 5,
        [-2.0] * 4,
    ]
    assert samples[0].fields["old_logprobs"].tolist() == [0, 0, -0.5, -1.0, -0.25]
    assert samples[0].fields["reference_logprobs"].tolist() == [-1, -1, -1.5, -2.0, -1.25]


@pytest.mark.parametrize(
    ("aggregation", "expected"),
    [("seq-mean-token-sum", (1 / 2, 1 / 2)), ("seq-mean-token-mean", (1 / 6, 1 / 2))],
)
def test_samples_are_weighted_by_the_aggregation(aggregation: str, expected: tuple[float, float]) -> None:
    old = [answer.rollout_logprobs for answer in TWO]
    samples = make_samples(
        TWO,
        torch.zeros(2),
        aggregation=aggregation,  # type: ignore[arg-type]
        old_logprobs=old,
        reference_logprobs=None,
    )
    assert [sample.weights.max().item() for sample in samples] == pytest.approx(expected)
    assert "reference_logprobs" not in samples[1].fields


def test_answer_metrics() -> None:
    answers = [
        answer(1, [0.0] * 3, Score(1.0)),
        answer(1, [0.0] * 6, Score(0.25), finished=False),
        answer(1, [0.0] * 2, Score(0.0, "timeout")),
        answer(1, [0.0] * 1, Score(0.0, "failed")),
    ]
    assert answer_metrics(answers, "train") == {
        "train/reward": 0.3125,
        "train/accuracy": 0.25,  # a part of the reward is not a right answer
        "train/response_length": 3.0,
        "train/response_length_max": 6.0,
        "train/cut_off": 0.25,
        "train/verifier_timeouts": 0.25,
        "train/verifier_failures": 0.25,
    }


def test_mismatch_looks_at_answers_alone() -> None:
    # The trainer says 0.1 more of one token, 0.2 less of another, nothing else of the third, 0.3 more of the fourth;
    # what it says of prompts (7.0) is not compared.
    trainer = [torch.tensor([7.0, 7.0, -0.4, -1.2, -0.25]), torch.tensor([7.0, 7.0, 7.0, -1.7])]
    metrics = mismatch_metrics(TWO, trainer)
    k3 = [math.exp(difference) - 1 - difference for difference in (0.1, -0.2, 0.0, 0.3)]
    assert metrics == {
        "mismatch/logprob_mean_abs": pytest.approx(0.15, rel=1e-5),
        "mismatch/logprob_max_abs": pytest.approx(0.3, rel=1e-5),
        "mismatch/kl": pytest.approx(sum(k3) / 4, rel=1e-4),
    }


def test_mismatch_of_equal_logprobs_is_nothing() -> None:
    assert set(mismatch_metrics(TWO, [answer.rollout_logprobs for answer in TWO]).values()) == {0.0}


def test_mismatch_of_no_tokens_is_not_reported() -> None:
    assert mismatch_metrics([answer(2, [])], [torch.zeros(2)]) == {}
