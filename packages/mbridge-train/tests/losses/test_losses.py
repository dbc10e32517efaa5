"""Losses against numbers worked out by hand and against twins written with plain PyTorch."""

import math
from typing import Any

import pytest
import torch
from mbridge_train.losses.base import LossInputs
from mbridge_train.losses.policy import kl_estimate, policy_loss
from mbridge_train.losses.sft import sft_loss
from torch import Tensor

NAN, INF = math.nan, math.inf


def loss_inputs(*, weights: Tensor, **values: Tensor) -> LossInputs:
    """Inputs of a loss from outputs of the head and fields of the samples."""
    outputs = {name: values.pop(name) for name in ("logprobs", "entropy") if name in values}
    return LossInputs(weights=weights, outputs=outputs, fields=values)


def by_hand(**changes: Any) -> LossInputs:
    """Ratios 1.5, 1.5, 0.5, 0.5, 4 with advantages 1, -1, 1, -1, -1, and a token without weight."""
    ratios = torch.tensor([1.5, 1.5, 0.5, 0.5, 4.0, NAN])
    fields: dict[str, Tensor] = {
        "logprobs": (ratios.log() - 1).requires_grad_(),
        "weights": torch.tensor([0.2, 0.2, 0.2, 0.2, 0.2, 0.0]),
        "old_logprobs": torch.tensor([-1.0, -1.0, -1.0, -1.0, -1.0, -INF]),
        "advantages": torch.tensor([1.0, -1.0, 1.0, -1.0, -1.0, NAN]),
    }
    return loss_inputs(**(fields | changes))


def numbers(metrics: dict[str, Tensor]) -> dict[str, float]:
    return {name: value.item() for name, value in metrics.items()}


def test_policy_loss_by_hand() -> None:
    inputs = by_hand()
    outputs = policy_loss(inputs, clip_ratio_low=0.2, clip_ratio_high=0.28, dual_clip=3.0)
    # -1.28 (clipped high), 1.5, -0.5, 0.8 (clipped low), 3 (dual clip)
    assert outputs.loss.item() == pytest.approx((-1.28 + 1.5 - 0.5 + 0.8 + 3) / 5)
    outputs.loss.backward()
    # d/dlogprob of -A r is -A r where nothing is clipped.
    gradient = inputs.outputs["logprobs"].grad
    assert gradient is not None
    assert gradient.tolist() == pytest.approx([0, 0.3, -0.1, 0, 0, 0])
    logs = [math.log(1.5)] * 2 + [math.log(0.5)] * 2 + [math.log(4)]
    assert numbers(outputs.metrics) == pytest.approx(
        {
            "loss": 0.704,
            "policy_loss": 0.704,
            "weight": 1.0,
            "ratio": 1.6,
            "approx_kl": 0.6 - sum(logs) / 5,
            "clip_fraction_low": 0.2,
            "clip_fraction_high": 0.2,
            "clip_fraction_dual": 0.2,
            "max_abs_log_ratio": math.log(4),
        }
    )


def test_policy_loss_without_dual_clip_by_hand() -> None:
    outputs = policy_loss(by_hand(), clip_ratio_low=0.2, clip_ratio_high=0.28)
    assert outputs.loss.item() == pytest.approx((-1.28 + 1.5 - 0.5 + 0.8 + 4) / 5)
    assert "clip_fraction_dual" not in outputs.metrics


def test_kl_and_entropy_terms_by_hand() -> None:
    inputs = loss_inputs(
        logprobs=torch.tensor([-1.0, -2.0]),
        weights=torch.tensor([0.5, 0.5]),
        old_logprobs=torch.tensor([-1.0, -2.0]),
        reference_logprobs=torch.tensor([-1.5, -1.0]),
        advantages=torch.zeros(2),
        entropy=torch.tensor([1.0, 3.0]),
    )
    outputs = policy_loss(inputs, kl_penalty="k3", kl_beta=0.1, entropy_bonus=0.01)
    kl = (math.exp(-0.5) - 1 + 0.5 + math.exp(1) - 1 - 1) / 2
    assert outputs.loss.item() == pytest.approx(0.1 * kl - 0.01 * 2)
    assert outputs.metrics["kl"].item() == pytest.approx(kl)
    assert outputs.metrics["entropy"].item() == 2
    assert outputs.metrics["policy_loss"].item() == 0
    # Without a coefficient both are reported and change nothing.
    reported = policy_loss(inputs, kl_penalty="k3")
    assert reported.loss.item() == 0
    assert reported.metrics["kl"].item() == pytest.approx(kl)


@pytest.mark.parametrize(
    ("kind", "values", "gradients"),
    [
        ("k1", [0.5, -1.0], [1.0, 1.0]),
        ("abs", [0.5, 1.0], [1.0, -1.0]),
        ("k2", [0.125, 0.5], [0.5, -1.0]),
        ("k3", [math.exp(-0.5) - 0.5, math.e - 2], [1 - math.exp(-0.5), 1 - math.e]),
    ],
)
def test_kl_estimates_by_hand(kind: Any, values: list[float], gradients: list[float]) -> None:
    logprobs = torch.tensor([-1.0, -2.0], requires_grad=True)
    estimate = kl_estimate(logprobs, torch.tensor([-1.5, -1.0]), kind)
    assert estimate.tolist() == pytest.approx(values)
    estimate.sum().backward()
    assert logprobs.grad is not None
    assert logprobs.grad.tolist() == pytest.approx(gradients)


def test_k1_and_k3_are_unbiased() -> None:
    generator = torch.Generator().manual_seed(5)
    policy, reference = torch.randn(2, 6, generator=generator, dtype=torch.float64).log_softmax(-1)
    exact = (policy.exp() * (policy - reference)).sum()
    for kind in ("k1", "k3"):
        expectation = (policy.exp() * kl_estimate(policy, reference, kind)).sum()  # type: ignore[arg-type]
        torch.testing.assert_close(expectation, exact)


def twin_policy_loss(
    inputs: LossInputs, low: float, high: float, dual: float | None, beta: float, penalty: str, bonus: float
) -> Tensor:
    """The same, one token at a time, with Python's own branches."""
    logprobs, entropy = inputs.outputs["logprobs"], inputs.outputs["entropy"]
    total = torch.zeros((), dtype=logprobs.dtype)
    for t in range(logprobs.numel()):
        if inputs.weights[t] == 0:
            continue
        ratio = torch.exp(logprobs[t] - inputs.fields["old_logprobs"][t])
        advantage = inputs.fields["advantages"][t]
        if advantage >= 0:
            loss = -advantage * min(ratio, torch.tensor(1 + high))
        else:
            loss = -advantage * max(ratio, torch.tensor(1 - low))
            if dual is not None:
                loss = min(loss, -advantage * dual)
        q_over_p = torch.exp(inputs.fields["reference_logprobs"][t] - logprobs[t])
        kl = {
            "k1": -torch.log(q_over_p),
            "abs": torch.log(q_over_p).abs(),
            "k2": 0.5 * torch.log(q_over_p) ** 2,
            "k3": q_over_p - torch.log(q_over_p) - 1,
        }[penalty]
        total = total + inputs.weights[t] * (loss + beta * kl - bonus * entropy[t])
    return total


@pytest.mark.parametrize("penalty", ["k1", "abs", "k2", "k3"])
@pytest.mark.parametrize("dual", [None, 1.5])
def test_policy_loss_against_twin(penalty: Any, dual: float | None) -> None:
    generator = torch.Generator().manual_seed(11)
    values = torch.randn(5, 57, generator=generator)
    weights = torch.rand(57, generator=generator) * (torch.rand(57, generator=generator) < 0.7)
    results = []
    for twin in (False, True):
        logprobs, entropy = values[0].clone().requires_grad_(), values[4].clone().requires_grad_()
        inputs = loss_inputs(
            logprobs=logprobs,
            weights=weights,
            entropy=entropy,
            old_logprobs=values[0] + 0.4 * values[1],
            # Near enough for k3 to stay below KL_LIMIT, which the twin does not have.
            reference_logprobs=values[0] + 0.5 * values[2],
            advantages=values[3],
        )
        if twin:
            loss = twin_policy_loss(inputs, 0.1, 0.3, dual, 0.05, penalty, 0.02)
        else:
            loss = policy_loss(
                inputs,
                clip_ratio_low=0.1,
                clip_ratio_high=0.3,
                dual_clip=dual,
                kl_penalty=penalty,
                kl_beta=0.05,
                entropy_bonus=0.02,
            ).loss
        loss.backward()
        results.append((loss.detach(), logprobs.grad, entropy.grad))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_no_nan_from_tokens_without_weight() -> None:
    logprobs = torch.tensor([-1.0, NAN, -INF, -1.0], requires_grad=True)
    entropy = torch.tensor([1.0, NAN, INF, 1.0], requires_grad=True)
    inputs = loss_inputs(
        logprobs=logprobs,
        weights=torch.tensor([0.5, 0.0, 0.0, 0.5]),
        entropy=entropy,
        old_logprobs=torch.tensor([-1.0, NAN, INF, -2.0]),
        reference_logprobs=torch.tensor([-1.0, -INF, NAN, -2.0]),
        advantages=torch.tensor([1.0, INF, NAN, 1.0]),
    )
    outputs = policy_loss(inputs, kl_penalty="k3", kl_beta=0.1, entropy_bonus=0.1, dual_clip=3)
    outputs.loss.backward()
    assert all(math.isfinite(value) for value in [outputs.loss.item(), *numbers(outputs.metrics).values()])
    for leaf in (logprobs, entropy):
        assert leaf.grad is not None
        assert bool(leaf.grad.isfinite().all())
        assert leaf.grad[1:3].tolist() == [0, 0]


def test_extreme_ratios_stay_finite() -> None:
    logprobs = torch.tensor([-1e-3, -300.0], requires_grad=True)
    inputs = loss_inputs(
        logprobs=logprobs,
        weights=torch.tensor([0.5, 0.5]),
        old_logprobs=torch.tensor([-300.0, -1e-3]),
        reference_logprobs=torch.tensor([-300.0, -1e-3]),
        advantages=torch.tensor([-1.0, -1.0]),
    )
    outputs = policy_loss(inputs, kl_penalty="k3", kl_beta=1.0)
    outputs.loss.backward()
    # e^20 for the first; 0.8 for the second; k3 is 19 + e^-20, clamped to 10, and 10 (e^20 clamped).
    assert outputs.loss.item() == pytest.approx((math.exp(20) + 0.8 + 20) / 2)
    assert logprobs.grad is not None
    assert bool(logprobs.grad.isfinite().all())
    assert outputs.metrics["max_abs_log_ratio"].item() == pytest.approx(299.999)


def test_clamp_of_the_log_ratio() -> None:
    logprobs = torch.tensor([-1.0, -4.0, -2.0], requires_grad=True)
    inputs = loss_inputs(
        logprobs=logprobs,
        weights=torch.full((3,), 1 / 3),
        old_logprobs=torch.tensor([-4.0, -1.0, -2.1]),
        advantages=torch.tensor([-1.0, 1.0, 1.0]),
    )
    outputs = policy_loss(inputs, clip_ratio_high=9.0, clip_log_ratio_min=-0.5, clip_log_ratio_max=1.0)
    outputs.loss.backward()
    # Logarithms 3, -3 and 0.1, clamped to 1, -0.5 and 0.1; only the last has a gradient.
    assert outputs.loss.item() == pytest.approx((math.exp(1) - math.exp(-0.5) - math.exp(0.1)) / 3)
    assert logprobs.grad is not None
    assert logprobs.grad.tolist() == pytest.approx([0, 0, -math.exp(0.1) / 3])
    assert outputs.metrics["max_abs_log_ratio"].item() == pytest.approx(3)


def test_sft_loss_against_cross_entropy() -> None:
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(9, 17, generator=generator, requires_grad=True)
    targets = torch.randint(0, 17, (9,), generator=generator)
    mask = torch.tensor([1, 0, 1, 1, 0, 0, 1, 1, 0]).bool()
    logprobs = logits.log_softmax(-1).gather(1, targets[:, None]).squeeze(1)
    outputs = sft_loss(loss_inputs(logprobs=logprobs, weights=mask / mask.sum()))
    (ours,) = torch.autograd.grad(outputs.loss, logits)
    expected = torch.nn.functional.cross_entropy(logits, targets.where(mask, -100))
    (theirs,) = torch.autograd.grad(expected, logits)
    torch.testing.assert_close(outputs.loss, expected)
    torch.testing.assert_close(ours, theirs)
    assert numbers(outputs.metrics) == pytest.approx({"loss": expected.item(), "weight": 1.0})


def test_sft_loss_ignores_nan_without_weight() -> None:
    logprobs = torch.tensor([NAN, -2.0], requires_grad=True)
    outputs = sft_loss(
        loss_inputs(logprobs=logprobs, weights=torch.tensor([0.0, 0.5]), entropy=torch.tensor([NAN, 4.0]))
    )
    outputs.loss.backward()
    assert outputs.loss.item() == 1
    assert outputs.metrics["entropy"].item() == 2
    assert logprobs.grad is not None
    assert logprobs.grad.tolist() == [0, -0.5]


def test_no_tokens() -> None:
    empty = torch.zeros(0)
    outputs = policy_loss(loss_inputs(logprobs=empty, weights=empty, old_logprobs=empty, advantages=empty))
    assert outputs.loss.item() == outputs.metrics["max_abs_log_ratio"].item() == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"kl_penalty": "k3"},
            "the field of the samples 'reference_logprobs'; there are: advantages, old_logprobs",
        ),
        ({"entropy_bonus": 0.1}, "needs the output of the head 'entropy'; there are: logprobs"),
        ({"kl_beta": 0.1}, "kl_beta=0.1 needs a kl_penalty"),
        ({"dual_clip": 1.0}, "dual_clip=1.0 must be greater than 1"),
        ({"clip_ratio_low": 1.5}, "clip_ratio_low=1.5 must be in"),
    ],
)
def test_policy_loss_rejects(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        policy_loss(by_hand(), **options)


def test_unknown_kl_penalty() -> None:
    with pytest.raises(ValueError, match="unknown kl_penalty 'k4'"):
        kl_estimate(torch.zeros(1), torch.zeros(1), "k4")  # type: ignore[arg-type]
