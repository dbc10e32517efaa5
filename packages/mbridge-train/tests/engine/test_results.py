"""Combining metrics, and bringing them to the host."""

import pytest
import torch
from mbridge_model import enable_cpu
from mbridge_train.losses.base import LossInputs
from mbridge_train.losses.policy import policy_loss

enable_cpu()
from mbridge_train.engine.results import Metrics, combine_metrics, mean_metrics  # noqa: E402


def by_hand(weights: torch.Tensor) -> LossInputs:
    """Ratios 1.5, 1.5, 0.5, 0.5, 4 with advantages 1, -1, 1, -1, -1, and a token without weight."""
    ratios = torch.tensor([1.5, 1.5, 0.5, 0.5, 4.0, 1.0])
    fields = {"old_logprobs": torch.full((6,), -1.0), "advantages": torch.tensor([1.0, -1.0, 1.0, -1.0, -1.0, 0.0])}
    return LossInputs(weights=weights, outputs={"logprobs": ratios.log() - 1}, fields=fields)


def numbers(metrics: dict[str, torch.Tensor]) -> dict[str, float]:
    return {name: value.item() for name, value in metrics.items()}


WEIGHTS = torch.tensor([0.2] * 5 + [0.0])


def test_parts_of_a_batch_combine_to_the_whole() -> None:
    inputs = by_hand(WEIGHTS)
    whole = policy_loss(inputs, dual_clip=3)
    parts = []
    for indices in ([0, 3], [5], [1, 2, 4]):
        part = LossInputs(
            weights=inputs.weights[indices],
            outputs={name: value[indices] for name, value in inputs.outputs.items()},
            fields={name: value[indices] for name, value in inputs.fields.items()},
        )
        parts.append(policy_loss(part, dual_clip=3).metrics)
    assert numbers(combine_metrics(parts)) == pytest.approx(numbers(whole.metrics))


def test_mean_metrics_divides_by_the_weight() -> None:
    # Sums over sequences: weights do not add up to 1, a mean ratio must come out all the same.
    doubled = mean_metrics(policy_loss(by_hand(2 * WEIGHTS)).metrics)
    once = mean_metrics(policy_loss(by_hand(WEIGHTS)).metrics)
    assert doubled["ratio"] == pytest.approx(once["ratio"]) == pytest.approx(1.6)
    assert doubled["loss"] == pytest.approx(2 * once["loss"])
    assert doubled["max_abs_log_ratio"] == once["max_abs_log_ratio"]
    assert "weight" not in once
    assert mean_metrics(policy_loss(by_hand(torch.zeros(6))).metrics)["ratio"] == 0


def test_metrics_are_read_when_they_are_looked_at() -> None:
    values = torch.zeros(3, dtype=torch.float64)
    metrics = Metrics(("loss", "max_ratio", "weight"), values)
    values += torch.tensor([3.0, 2.0, 0.5])  # what the GPU does after the host has them
    assert metrics == {"loss": 3.0, "max_ratio": 2.0}
    values += 1
    assert metrics["loss"] == 3.0, "read once"
