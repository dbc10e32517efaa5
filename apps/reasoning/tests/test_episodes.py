"""From episodes to samples and metrics, against values computed by hand."""

import math

import pytest
import torch
from mbridge_reasoning.data.prompts import Prompt
from mbridge_reasoning.episodes import Episode, make_samples, single_turn
from mbridge_reasoning.metrics import episode_metrics, mismatch_metrics
from mbridge_reasoning.rewards.base import Score
from mbridge_reasoning.rollout.base import Completion


def answer(prompt: int, logprobs: list[float], score: Score | None = None, *, finished: bool = True) -> Episode:
    """An answer of `len(logprobs)` tokens (101, 102, …) to a prompt of `prompt` tokens (1, 2, …)."""
    completion = Completion(
        request=0,
        tokens=list(range(101, 101 + len(logprobs))),
        logprobs=logprobs,
        end="end_token" if finished else "length",
        weights_version=1,
    )
    tokens = tuple(range(1, prompt + 1))
    question = Prompt(content="?", solutions=("1",), source="test", tokens=tokens)
    return single_turn(question, completion, score or Score(1.0))


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


def test_episode_metrics() -> None:
    episodes = [
        answer(1, [0.0] * 3, Score(1.0)),
        answer(1, [0.0] * 6, Score(0.25), finished=False),
        answer(1, [0.0] * 2, Score(0.0, "timeout")),
        answer(1, [0.0] * 1, Score(0.0, "failed")),
    ]
    assert episode_metrics(episodes, "train") == {
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


def test_tokens_that_others_wrote_between_turns_are_not_trained() -> None:
    """Policy, tool, policy: the mask decides, not the length of the prompt."""
    wrote = torch.tensor([False, True, False, False, True, True])
    logprobs = torch.tensor([0, -0.5, 0, 0, -1.0, -0.25])
    episode = Episode(
        tokens=torch.arange(6), policy_mask=wrote, rollout_logprobs=logprobs, score=Score(1.0), end="length"
    )
    (sample,) = make_samples(
        [episode], torch.tensor([2.0]), aggregation="token-mean", old_logprobs=[logprobs], reference_logprobs=None
    )
    assert sample.weights.tolist() == pytest.approx([0, 1 / 3, 0, 0, 1 / 3, 1 / 3])
    metrics = episode_metrics([episode], "train") | mismatch_metrics([episode], [torch.full((6,), 7.0)])
    assert metrics["train/response_length"] == 3.0
    assert metrics["mismatch/logprob_max_abs"] == 8.0  # of 7.0 from -1.0
    assert metrics["mismatch/logprob_mean_abs"] == pytest.approx((7.5 + 8.0 + 7.25) / 3)


def test_episodes_that_begin_with_the_policy_or_have_parts_missing_are_refused() -> None:
    parts = {"tokens": torch.arange(2), "policy_mask": torch.tensor([False, True]), "rollout_logprobs": torch.zeros(2)}
    with pytest.raises(ValueError, match="nothing predicts it"):
        Episode(**{**parts, "policy_mask": torch.tensor([True, True])}, score=Score(1.0), end="length")
    with pytest.raises(ValueError, match="2 tokens, 2 entries of the mask and 3 log probabilities"):
        Episode(**{**parts, "rollout_logprobs": torch.zeros(3)}, score=Score(1.0), end="length")
