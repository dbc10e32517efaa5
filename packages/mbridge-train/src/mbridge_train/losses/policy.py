"""Losses as pure functions of per-token tensors.

Every loss is ``sum(weights * token_loss)`` with the weights of :mod:`mbridge_train.engine.batch`, so the losses and
gradients of micro-batches and data-parallel ranks add up to those of the global batch. So do all metrics, which are
weighted sums too, except those named ``max_…``, which combine by maximum; :func:`combine_metrics` knows both.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

KLPenalty = Literal["k1", "abs", "k2", "k3"]
"""How the KL divergence from the reference is estimated; see :func:`kl_estimate`."""

LOG_RATIO_LIMIT = 20.0
"""Log probability ratios are clamped to ±20 before exp(): a ratio of 5e8 is far beyond any clipping, and a token that
the other policy all but excludes must not overflow. Beyond the limit the gradient of the ratio is zero."""

KL_LIMIT = 10.0
"""Largest k3 estimate of one token, which grows exponentially: beyond it the value is clamped and its gradient zero."""


@dataclass(kw_only=True, slots=True)
class LossInputs:
    """Per-token values, all float32 [tokens] on one device. Where the weight is 0 the others may be NaN or infinite."""

    logprobs: Tensor
    """Log probabilities under the policy in training; the loss is differentiated with respect to these."""
    weights: Tensor
    """Loss weights over the global batch; 0 for tokens that are not trained and for padding."""
    entropy: Tensor | None = None
    """Entropies of the policy's distributions, differentiable as well."""
    old_logprobs: Tensor | None = None
    """Log probabilities under the policy that the importance ratio is taken to."""
    reference_logprobs: Tensor | None = None
    """Log probabilities under the reference policy of the KL penalty."""
    advantages: Tensor | None = None


@dataclass(kw_only=True, slots=True)
class LossOutputs:
    """A differentiable scalar, and detached scalars to log."""

    loss: Tensor
    metrics: dict[str, Tensor]


def policy_loss(
    inputs: LossInputs,
    *,
    clip_ratio_low: float = 0.2,
    clip_ratio_high: float = 0.2,
    dual_clip: float | None = None,
    kl_penalty: KLPenalty | None = None,
    kl_beta: float = 0.0,
    entropy_bonus: float = 0.0,
) -> LossOutputs:
    """Clipped policy-gradient loss of PPO and GRPO.

    With the ratio r = exp(logprob - old_logprob) and the advantage A, the loss of a token is
    ``max(-A r, -A clamp(r, 1 - clip_ratio_low, 1 + clip_ratio_high))`` (PPO, arXiv 1707.06347, eq. 7; separate bounds:
    DAPO, arXiv 2503.14476, section 3.1). With ``dual_clip`` c > 1 and A < 0 it is at most ``-A c``, so that a token
    that became much more likely since it was sampled cannot dominate (dual-clip PPO, Ye et al., arXiv 1912.09729). Then
    ``kl_beta * KL - entropy_bonus * entropy`` is added (GRPO, arXiv 2402.03300, eq. 3).

    Args:
        inputs: needs ``old_logprobs`` and ``advantages``; ``reference_logprobs`` with ``kl_penalty``; ``entropy`` with
            ``entropy_bonus``.
        clip_ratio_low: how far the ratio may fall below 1, in [0, 1].
        clip_ratio_high: how far the ratio may rise above 1, not negative.
        dual_clip: bound c above, greater than 1; None: no bound.
        kl_penalty: estimator of the KL divergence; None: no KL, neither in the loss nor in the metrics.
        kl_beta: its coefficient; 0 only reports it.
        entropy_bonus: coefficient of the entropy.

    Returns:
        The loss and the metrics below, each summed over tokens with their weights. Which ones there are depends on
        the options and on ``inputs.entropy`` being given, not on values.

        ``loss``, ``policy_loss`` (without KL and entropy), ``weight`` (sum of weights: what the sums below are to be
        divided by), ``ratio``, ``approx_kl`` (of the old from the current policy, (r - 1) - log r, Schulman 2020),
        ``clip_fraction_low`` and ``clip_fraction_high`` (tokens whose gradient a bound of the ratio removes),
        ``clip_fraction_dual`` (likewise), ``kl``, ``entropy``, and ``max_abs_log_ratio`` over tokens with a weight.

    Raises:
        ValueError: a missing input, or a coefficient out of its range.
    """
    if not 0 <= clip_ratio_low <= 1 or clip_ratio_high < 0:
        raise ValueError(f"clip_ratio_low={clip_ratio_low} must be in [0, 1], clip_ratio_high={clip_ratio_high} >= 0")
    if dual_clip is not None and dual_clip <= 1:
        raise ValueError(f"dual_clip={dual_clip} must be greater than 1")
    if kl_beta and kl_penalty is None:
        raise ValueError(f"kl_beta={kl_beta} needs a kl_penalty")
    weights = inputs.weights
    trained = weights > 0
    logprobs = _where_trained(trained, inputs.logprobs, "logprobs")
    advantages = _where_trained(trained, inputs.advantages, "advantages")
    log_ratio = logprobs - _where_trained(trained, inputs.old_logprobs, "old_logprobs")
    max_abs_log_ratio = log_ratio.detach().abs().max() if log_ratio.numel() else log_ratio.new_zeros(())
    log_ratio = log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    ratio = log_ratio.exp()

    unclipped = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - clip_ratio_low, 1 + clip_ratio_high)
    token_loss = torch.maximum(unclipped, clipped)
    active = clipped > unclipped
    metrics = {
        "ratio": ratio,
        "approx_kl": (ratio - 1) - log_ratio,
        "clip_fraction_low": active & (advantages < 0),
        "clip_fraction_high": active & (advantages > 0),
    }
    if dual_clip is not None:
        bound = -advantages * dual_clip
        exceeds = (advantages < 0) & (token_loss > bound)
        token_loss = torch.where(exceeds, bound, token_loss)
        metrics["clip_fraction_dual"] = exceeds
    metrics["policy_loss"] = token_loss

    if kl_penalty is not None:
        reference = _where_trained(trained, inputs.reference_logprobs, "reference_logprobs")
        kl = kl_estimate(logprobs, reference, kl_penalty)
        metrics["kl"] = kl
        token_loss = token_loss + kl_beta * kl
    if inputs.entropy is not None or entropy_bonus:
        entropy = _where_trained(trained, inputs.entropy, "entropy")
        metrics["entropy"] = entropy
        token_loss = token_loss - entropy_bonus * entropy

    loss = (weights * token_loss).sum()
    sums = {name: (weights * value.detach()).sum() for name, value in metrics.items()}
    return LossOutputs(
        loss=loss,
        metrics={
            "loss": loss.detach().clone(),
            "weight": weights.sum(),
            **sums,
            "max_abs_log_ratio": max_abs_log_ratio,
        },
    )


def sft_loss(inputs: LossInputs) -> LossOutputs:
    """Negative log likelihood of the targets, ``sum(weights * -logprobs)``.

    Returns:
        The loss and the metrics ``loss``, ``weight`` (sum of weights), and ``entropy`` if it is given.
    """
    trained = inputs.weights > 0
    loss = -(inputs.weights * _where_trained(trained, inputs.logprobs, "logprobs")).sum()
    metrics = {"loss": loss.detach().clone(), "weight": inputs.weights.sum()}
    if inputs.entropy is not None:
        metrics["entropy"] = (inputs.weights * _where_trained(trained, inputs.entropy, "entropy").detach()).sum()
    return LossOutputs(loss=loss, metrics=metrics)


def kl_estimate(logprobs: Tensor, reference_logprobs: Tensor, kind: KLPenalty) -> Tensor:
    """Per-token estimate of KL(policy ‖ reference) from the log probabilities of a token that the policy sampled.

    With d = logprob - reference_logprob, clamped to ±``LOG_RATIO_LIMIT`` (Schulman 2020, "Approximating KL
    Divergence"):

    * ``k1``: d. Unbiased, but of high variance, and its gradient is zero on average: use it to report.
    * ``abs``: \\|d\\|. A distance, not an estimate of the divergence.
    * ``k2``: d² / 2. Biased; its gradient is that of the divergence on average.
    * ``k3``: exp(-d) - 1 + d. Unbiased and never negative (GRPO, arXiv 2402.03300, eq. 4). At most ``KL_LIMIT``.

    Args:
        logprobs: float [tokens], differentiable.
        reference_logprobs: float [tokens].
        kind: the estimator.

    Returns:
        float [tokens], in nats.

    Raises:
        ValueError: unknown ``kind``.
    """
    difference = (logprobs - reference_logprobs).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    match kind:
        case "k1":
            return difference
        case "abs":
            return difference.abs()
        case "k2":
            return difference.square() / 2
        case "k3":
            return (torch.expm1(-difference) + difference).clamp(max=KL_LIMIT)
        case _:
            raise ValueError(f"unknown kl_penalty {kind!r}: use one of k1, abs, k2, k3")


def combine_metrics(parts: Iterable[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Metrics of several micro-batches or ranks as those of all of them: maxima of ``max_…``, sums of the others."""
    total: dict[str, Tensor] = {}
    for part in parts:
        for name, value in part.items():
            if name not in total:
                total[name] = value
            elif is_maximum(name):
                total[name] = torch.maximum(total[name], value)
            else:
                total[name] = total[name] + value
    return total


def is_maximum(name: str) -> bool:
    """Whether a metric combines by maximum instead of by sum."""
    return name.startswith("max_")


def mean_metrics(metrics: Mapping[str, Tensor | float]) -> dict[str, float]:
    """Combined metrics as numbers to log: weighted means of per-token values; losses and maxima as they are.

    For token-mean and seq-mean-token-mean the weights of a global batch sum to 1 and this changes nothing; for
    seq-mean-token-sum it turns sums over a sequence into means over tokens. ``weight`` itself is left out. Means over
    no weight at all are 0.
    """
    weight = float(metrics["weight"])
    unchanged = ("loss", "policy_loss")
    return {
        name: float(value) if name in unchanged or is_maximum(name) else (float(value) / weight if weight else 0.0)
        for name, value in metrics.items()
        if name != "weight"
    }


def _where_trained(trained: Tensor, value: Tensor | None, name: str) -> Tensor:
    """Zero where there is no weight: 0 * NaN is NaN, in the loss and in its gradient."""
    if value is None:
        raise ValueError(f"this loss needs LossInputs.{name}")
    return torch.where(trained, value, 0)
