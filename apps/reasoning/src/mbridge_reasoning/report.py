"""Which curves the report of a reasoning run shows."""

from pathlib import Path

from mbridge_train.metrics import METRICS_FILE
from mbridge_train.report import Chart, write_report

# Validation and saving happen in some steps only, and would leave holes in the stack.
PHASES = ("stream", "generate", "reward", "logprobs", "reference", "train", "other")
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
    Chart(title="Time of a step", metrics=TIME_SPLIT, unit="seconds", stacked=True, smooth=False),
)


def write_run_report(directory: Path, *, title: str, config: str) -> None:
    """Write `report.html` from the metrics recorded in the run's directory."""
    write_report(directory / METRICS_FILE, directory / "report.html", title=title, charts=CHARTS, config=config)
