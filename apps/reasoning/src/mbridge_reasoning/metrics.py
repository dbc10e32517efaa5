"""Metrics of episodes and steps, and their display: figures on the terminal, curves in the report."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from mbridge_train.run.output import THROUGHPUT_CHARTS, Display
from mbridge_train.run.report import Chart
from torch import Tensor
from torch.profiler import record_function

from mbridge_reasoning.episodes import Episode

# Validation and saving happen in some steps only, and would leave holes in the stack.
PHASES = ("offload", "stream", "generate", "reward", "onload", "logprobs", "reference", "train", "other")
TIME_SPLIT = tuple(f"time/{phase}" for phase in PHASES)

DISPLAY = Display(
    description="GRPO",
    figures={
        "train/accuracy": "accuracy",
        "validation/accuracy": "held-out",
        "train/response_length": "length",
        "policy/kl": "kl",
        "policy/entropy": "entropy",
        "policy/grad_norm": "grad norm",
        "mismatch/logprob_mean_abs": "mismatch",
        "mfu": "mfu",
        "time/step": "seconds",
    },
    charts=(
        Chart(title="Accuracy", metrics=("train/accuracy", "validation/accuracy"), best="max"),
        Chart(title="Reward", metrics=("train/reward", "validation/reward"), best="max"),
        Chart(title="Response length", metrics=("train/response_length", "validation/response_length"), unit="tokens"),
        Chart(title="KL", metrics=("policy/kl", "policy/approx_kl"), unit="nats"),
        Chart(title="Entropy", metrics=("policy/entropy",), unit="nats"),
        Chart(title="Gradient norm", metrics=("policy/grad_norm",)),
        Chart(
            title="Train/rollout mismatch",
            metrics=("mismatch/logprob_mean_abs", "mismatch/logprob_max_abs"),
            unit="nats",
        ),
        Chart(title="Learning rate", metrics=("policy/learning_rate",), smooth=False),
        Chart(title="Clipped tokens", metrics=("policy/clip_fraction_*",)),
        *THROUGHPUT_CHARTS,
        Chart(title="Time of a step", metrics=TIME_SPLIT, unit="seconds", stacked=True, smooth=False),
    ),
)


def episode_metrics(episodes: Sequence[Episode], prefix: str) -> dict[str, float]:
    """Measure rewards and lengths.

    `accuracy`, `cut_off` (no end within the allowed length), `verifier_timeouts` and `verifier_failures` are shares of
    the episodes; lengths count the tokens that the policy wrote, including the end token.
    """
    rewards = torch.tensor([episode.score.value for episode in episodes])
    lengths = torch.tensor([float(episode.policy_mask.sum()) for episode in episodes])
    count = len(episodes)
    return {
        f"{prefix}/reward": rewards.mean().item(),
        f"{prefix}/accuracy": sum(episode.score.right for episode in episodes) / count,
        f"{prefix}/response_length": lengths.mean().item(),
        f"{prefix}/response_length_max": lengths.max().item(),
        f"{prefix}/cut_off": sum(episode.end == "length" for episode in episodes) / count,
        f"{prefix}/verifier_timeouts": sum(episode.score.status == "timeout" for episode in episodes) / count,
        f"{prefix}/verifier_failures": sum(episode.score.status == "failed" for episode in episodes) / count,
    }


def mismatch_metrics(episodes: Sequence[Episode], trainer_logprobs: Sequence[Tensor]) -> dict[str, float]:
    """Measure how far the rollout engine's log probabilities are from the trainer's for the same weights and tokens.

    Both should be of the same distribution, so this measures differences of kernels and precision, and reveals stale or
    damaged weights at once. The KL estimate is k3 (Schulman 2020) of rollout from trainer. `trainer_logprobs`: float32
    [length] per episode, of which only tokens that the policy wrote are compared.
    """
    differences = torch.cat(
        [
            (ours - episode.rollout_logprobs)[episode.policy_mask]
            for episode, ours in zip(episodes, trainer_logprobs, strict=True)
        ]
    )
    if not differences.numel():
        return {}
    return {
        "mismatch/logprob_mean_abs": differences.abs().mean().item(),
        "mismatch/logprob_max_abs": differences.abs().max().item(),
        "mismatch/kl": (torch.expm1(differences) - differences).mean().item(),
    }


class Phases:
    """The seconds that each phase of a step took, on this rank. A phase may be entered several times."""

    def __init__(self) -> None:
        self.begin()

    def begin(self) -> None:
        self.seconds: dict[str, float] = {}
        self._started = time.perf_counter()

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Add the duration of the context to `phase`, and show it in traces of the profiler."""
        started = time.perf_counter()
        with record_function(phase):
            yield
        self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - started

    def metrics(self, tokens: float) -> dict[str, float]:
        """Split the time of the step, which had `tokens` tokens, into its phases."""
        total = time.perf_counter() - self._started
        # A validation before the step may have streamed its weights; without the phase the report could stack no times.
        split = {f"time/{phase}": spent for phase, spent in ({"stream": 0.0} | self.seconds).items()}
        other = total - sum(self.seconds.values())
        return split | {"time/other": other, "time/step": total, "tokens_per_second": tokens / total}


def minibatch_metrics(minibatches: Sequence[dict[str, float]]) -> dict[str, float]:
    """Return the metrics of a step: the maximum over its minibatches of each ``max_…``, the mean of others."""
    result = {}
    for name in dict.fromkeys(name for metrics in minibatches for name in metrics):
        values = [metrics[name] for metrics in minibatches if name in metrics]
        is_maximum = name.rpartition("/")[2].startswith("max_")
        result[name] = max(values) if is_maximum else sum(values) / len(values)
    return result
