"""Messages before a rank starts, for a run whose length depends on the data."""

import json
from pathlib import Path

import pytest
from mbridge_config import ConfigError, ReasoningConfig, compose
from mbridge_reasoning.cli import check_start

WARMUP = "actor.lr_sched.lr_warmup_iters"


@pytest.fixture
def problems(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file of 24 problems in the working directory."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.jsonl").write_text((json.dumps({"prompt": "1 + 1 =", "solutions": ["2"]}) + "\n") * 24)
    return tmp_path / "train.jsonl"


def start(data: Path, *overrides: str) -> None:
    """The quickstart's config on `data`, with a rate that decays over the whole run."""
    own = (
        "data.type=math",
        f"data.train_data_paths=[{data}]",
        "data.rollout_batch_size=4",
        "algorithm.n_minibatches=2",
    )
    overrides = (*own, "reward.reward_type=math", "actor.lr_sched.lr_decay_style=cosine", *overrides)
    check_start(compose("quickstart", None, overrides, package_config="mbridge_reasoning", schema=ReasoningConfig))


@pytest.mark.parametrize("steps", [100, -1])
def test_epochs_end_first(problems: Path, steps: int) -> None:
    """2 epochs of 24 problems are 12 batches of 4, with 2 optimizer steps each."""
    epochs = (f"runner.max_steps={steps}", "runner.max_epochs=2")
    start(problems, *epochs, f"{WARMUP}=23")
    with pytest.raises(ConfigError, match=r"12 steps of .* in runner\.max_epochs 2 of 24 rows = 24 optimizer") as said:
        start(problems, *epochs, f"{WARMUP}=24")
    assert [problem.key for problem in said.value.problems] == [WARMUP]


def test_steps_end_first(problems: Path) -> None:
    start(problems, "runner.max_steps=10", "runner.max_epochs=2", f"{WARMUP}=19")
    with pytest.raises(ConfigError, match=r"algorithm\.n_minibatches 2 x runner\.max_steps 10 = 20 optimizer"):
        start(problems, "runner.max_steps=10", "runner.max_epochs=2", f"{WARMUP}=20")


def test_steps_without_epochs(problems: Path) -> None:
    start(problems, "runner.max_steps=100", f"{WARMUP}=199")
