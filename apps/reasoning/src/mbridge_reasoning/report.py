"""What is shown of a reasoning run: figures on the terminal, curves in the report."""

from mbridge_train.run.output import THROUGHPUT_CHARTS, Display
from mbridge_train.run.report import Chart

FIGURES = {
    "train/accuracy": "accuracy",
    "validation/accuracy": "held-out",
    "train/response_length": "length",
    "policy/kl": "kl",
    "policy/entropy": "entropy",
    "policy/grad_norm": "grad norm",
    "mismatch/logprob_mean_abs": "mismatch",
    "mfu": "mfu",
    "time/step": "seconds",
}

# Validation and saving happen in some steps only, and would leave holes in the stack.
PHASES = ("offload", "stream", "generate", "reward", "onload", "logprobs", "reference", "train", "other")
TIME_SPLIT = tuple(f"time/{phase}" for phase in PHASES)

CHARTS = (
    Chart(title="Accuracy", metrics=("train/accuracy", "validation/accuracy"), best="max"),
    Chart(title="Reward", metrics=("train/reward", "validation/reward"), best="max"),
    Chart(title="Response length", metrics=("train/response_length", "validation/response_length"), unit="tokens"),
    Chart(title="KL", metrics=("policy/kl", "policy/approx_kl"), unit="nats"),
    Chart(title="Entropy", metrics=("policy/entropy",), unit="nats"),
    Chart(title="Gradient norm", metrics=("policy/grad_norm",)),
    Chart(
        title="Train/rollout mismatch", metrics=("mismatch/logprob_mean_abs", "mismatch/logprob_max_abs"), unit="nats"
    ),
    Chart(title="Learning rate", metrics=("policy/learning_rate",), smooth=False),
    Chart(title="Clipped tokens", metrics=("policy/clip_fraction_*",)),
    *THROUGHPUT_CHARTS,
    Chart(title="Time of a step", metrics=TIME_SPLIT, unit="seconds", stacked=True, smooth=False),
)

DISPLAY = Display(description="GRPO", figures=FIGURES, charts=CHARTS)
