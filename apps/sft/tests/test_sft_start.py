"""Messages before a rank starts, for a run whose length depends on the data."""

import json
from pathlib import Path

import pytest
from mbridge_config import ConfigError, SFTConfig, compose
from mbridge_sft.start import check_start

WARMUP = "actor.lr_sched.lr_warmup_iters"


@pytest.fixture
def chats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file of 24 rows in the working directory."""
    monkeypatch.chdir(tmp_path)
    turns = [{"role": "user", "content": "1 + 1"}, {"role": "assistant", "content": "2"}]
    (tmp_path / "chats.jsonl").write_text((json.dumps({"messages": turns}) + "\n") * 24)
    return tmp_path / "chats.jsonl"


def start(data: Path, *overrides: str) -> None:
    """The quickstart's config on `data`: cosine decay over the whole run."""
    own = (f"data.train_data_paths=[{data}]", "data.val_data_paths=[]", "actor.global_batch_size=4")
    check_start(compose("quickstart", None, (*own, *overrides), package_config="mbridge_sft", schema=SFTConfig))


def test_epochs_end_before_the_steps(chats: Path) -> None:
    """2 epochs of 24 rows are 12 batches of 4, fewer than max_steps."""
    epochs = ("runner.max_steps=100", "runner.max_epochs=2")
    start(chats, *epochs, f"{WARMUP}=11")
    with pytest.raises(
        ConfigError, match=r"12 steps of actor\.global_batch_size 4 in runner\.max_epochs 2 of 24"
    ) as said:
        start(chats, *epochs, f"{WARMUP}=12")
    assert [problem.key for problem in said.value.problems] == [WARMUP]


def test_steps_end_before_the_epochs(chats: Path) -> None:
    start(chats, "runner.max_steps=10", "runner.max_epochs=2", f"{WARMUP}=9")
    with pytest.raises(ConfigError, match=r"runner\.max_steps 10"):
        start(chats, "runner.max_steps=10", "runner.max_epochs=2", f"{WARMUP}=10")


def test_steps_without_epochs(chats: Path) -> None:
    start(chats, "runner.max_steps=100", f"{WARMUP}=99")


def test_last_decay_longer_than_the_epochs(chats: Path) -> None:
    wsd = ("runner.max_steps=-1", "actor.lr_sched.lr_decay_style=WSD", f"{WARMUP}=2")
    start(chats, *wsd, "actor.lr_sched.lr_wsd_decay_iters=4")
    with pytest.raises(ConfigError, match=r"lr_wsd_decay_iters = 5: longer than the 4 steps that .*lr_warmup_iters 2"):
        start(chats, *wsd, "actor.lr_sched.lr_wsd_decay_iters=5")
