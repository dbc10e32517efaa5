"""The clipped policy loss of PPO and GRPO, and estimators of the KL divergence."""

from typing import Literal

import torch
from torch import Tensor

from mbridge_train.losses.base import LossInputs, LossOutputs

KLPenalty = Literal["k1", "abs", "k2", "k3"]
"""How the KL divergence from the reference is estimated; see :func:`kl_estimate`."""

LOG_RATIO_LIMIT = 20.0
"""Log ratios are clamped to ± this before exp(), so that the ratio of a token that the other policy all but excludes
does not overflow. Beyond the limit, a ratio of 5e8, the gradient of the ratio is zero."""

KL_LIMIT = 10.0
"""Limit of the k3 estimate of a token, which grows exponentially. Beyond it the gradient is zero."""


def policy_loss(
    inputs: LossInputs,
    *,
    clip_ratio_low: float = 0.2,
    clip_ratio_high: float = 0.2,
    dual_clip: float | None = None,
    clip_log_ratio_min: float | None = None,
    clip_log_ratio_max: float | None = None,
    kl_penalty: KLPenalty | None = None,
    kl_beta: float = 0.0,
    entropy_bonus: float = 0.0,
) -> LossOutputs:
    """Return the clipped policy-gradient loss of PPO and GRPO.

    With the ratio r = exp(logprob - old_logprob) and the advantage A, the loss of a token is
    ``max(-A r, -A clamp(r, 1 - clip_ratio_low, 1 + clip_ratio_high))`` (PPO, arXiv 1707.06347, eq. 7; separate bounds:
    DAPO, arXiv 2503.14476, section 3.1). With ``dual_clip`` c and A < 0 it is at most ``-A c``, so that a token that
    became much more likely since it was sampled cannot dominate (dual-clip PPO, Ye et al., arXiv 1912.09729). Then
    ``kl_beta * KL - entropy_bonus * entropy`` is added (GRPO, arXiv 2402.03300, eq. 3).

    Args:
        inputs: needs the output ``logprobs`` and the fields ``old_logprobs`` and ``advantages``; with ``kl_penalty``
            the field ``reference_logprobs``; with ``entropy_bonus`` the output ``entropy``.
        clip_ratio_low: how far the ratio may fall below 1, in [0, 1].
        clip_ratio_high: how far the ratio may rise above 1, not negative.
        dual_clip: the bound c, greater than 1; None: no bound.
        clip_log_ratio_min: lower limit of log r, in [-``LOG_RATIO_LIMIT``, 0); None: -``LOG_RATIO_LIMIT``.
        clip_log_ratio_max: upper limit of log r, in (0, ``LOG_RATIO_LIMIT``]; None: ``LOG_RATIO_LIMIT``.
        kl_penalty: estimator of the KL divergence; None: no KL, neither in the loss nor in the metrics.
        kl_beta: coefficient of the KL divergence; 0: only report it.
        entropy_bonus: coefficient of the entropy.

    Returns:
        The loss and the metrics ``loss``, ``policy_loss`` (without KL and entropy), ``weight`` (sum of weights),
        ``ratio``, ``approx_kl`` (of the old from the current policy, (r - 1) - log r, Schulman 2020),
        ``clip_fraction_low``, ``clip_fraction_high`` and ``clip_fraction_dual`` (tokens whose gradient this bound
        removes), ``kl``, ``entropy``, and ``max_abs_log_ratio`` over tokens with a weight. All but the last are
        weighted sums. ``clip_fraction_dual``, ``kl`` and ``entropy`` are present if their option or input is given.

    Raises:
        ValueError: an input is missing, or a coefficient is out of its range.
    """
    if not 0 <= clip_ratio_low <= 1 or clip_ratio_high < 0:
        raise ValueError(f"clip_ratio_low={clip_ratio_low} must be in [0, 1], clip_ratio_high={clip_ratio_high} >= 0")
    if dual_clip is not None and dual_clip <= 1:
        raise ValueError(f"dual_clip={dual_clip} must be greater than 1")
    lowest = -LOG_RATIO_LIMIT if clip_log_ratio_min is None else clip_log_ratio_min
    highest = LOG_RATIO_LIMIT if clip_log_ratio_max is None else clip_log_ratio_max
    if not -LOG_RATIO_LIMIT <= lowest < 0 < highest <= LOG_RATIO_LIMIT:
        raise ValueError(
            f"clip_log_ratio_min={clip_log_ratio_min} must be in [-{LOG_RATIO_LIMIT}, 0), "
            f"clip_log_ratio_max={clip_log_ratio_max} in (0, {LOG_RATIO_LIMIT}]"
        )
    if kl_beta and kl_penalty is None:
        raise ValueError(f"kl_beta={kl_beta} needs a kl_penalty")
    weights = inputs.weights
    logprobs = inputs.output("logprobs")
    advantages = inputs.field("advantages")
    log_ratio = logprobs - inputs.field("old_logprobs")
    max_abs_log_ratio = log_ratio.detach().abs().max() if log_ratio.numel() else log_ratio.new_zeros(())
    log_ratio = log_ratio.clamp(lowest, highest)
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
        kl = kl_estimate(logprobs, inputs.field("reference_logprobs"), kl_penalty)
        metrics["kl"] = kl
        token_loss = token_loss + kl_beta * kl
    if "entropy" in inputs.outputs or entropy_bonus:
        entropy = inputs.output("entropy")
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


def kl_estimate(logprobs: Tensor, reference_logprobs: Tensor, kind: KLPenalty) -> Tensor:
    """Return per-token estimates of KL(policy ‖ reference) for tokens that the policy sampled.

    With d = logprob - reference_logprob, clamped to ±``LOG_RATIO_LIMIT`` (Schulman 2020, "Approximating KL
    Divergence"):

    * ``k1``: d. Unbiased, but with high variance and a mean gradient of zero: use it only to report.
    * ``abs``: \\|d\\|. A distance, not an estimate of the divergence.
    * ``k2``: d² / 2. Biased; its mean gradient is that of the divergence.
    * ``k3``: exp(-d) - 1 + d. Unbiased and never negative (GRPO, arXiv 2402.03300, eq. 4). At most ``KL_LIMIT``.

    Args:
        logprobs: float [tokens], differentiable.
        reference_logprobs: float [tokens].

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
