"""The quickstart's warm-up has its own schedule, whatever the schedule of the run."""

import pytest
from mbridge_config import ReasoningConfig, compose
from mbridge_reasoning.quickstart.prepare import warmup_actor
from mbridge_train.build import optimizer_settings


@pytest.mark.parametrize(
    "given",
    [
        [],
        ["actor.lr_sched.lr_warmup_fraction=1.0"],
        ["actor.lr_sched.lr_decay_iters=10", "actor.lr_sched.lr_decay_style=cosine"],
        ["actor.optim.lr=1e-2", "actor.lr_sched.lr_warmup_init=5e-3"],
        ["quickstart.warmup_steps=0", "quickstart.warmup_short_steps=0"],
    ],
    ids=["as it is", "share", "short decay", "high start", "none"],
)
def test_warmup_schedule(given: list[str]) -> None:
    config = compose("quickstart", None, given, package_config="mbridge_reasoning", schema=ReasoningConfig)
    steps = config.quickstart.warmup_steps
    schedule = optimizer_settings(warmup_actor(config), optimizer_steps=steps).schedule
    assert (schedule.decay_style, schedule.decay_steps) == ("linear", max(1, steps))
    assert (schedule.warmup_steps, schedule.max_lr, schedule.min_lr) == (min(20, steps // 2), 2e-3, 0)
