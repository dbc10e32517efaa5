"""Schedules against Megatron-LM's scheduler and against points worked out by hand."""

from types import SimpleNamespace
from typing import Any

import pytest
from mbridge_train.errors import TrainError
from mbridge_train.optim.schedule import Schedule

STYLES: list[dict[str, Any]] = [
    {"decay_style": "constant"},
    {"decay_style": "linear"},
    {"decay_style": "cosine"},
    {"decay_style": "inverse-square-root"},
    *(
        {"decay_style": "WSD", "wsd_decay_style": style, "wsd_decay_steps": 7}
        for style in ("linear", "cosine", "exponential", "minus_sqrt")
    ),
]


@pytest.mark.parametrize("style", STYLES, ids=lambda s: s["decay_style"] + s.get("wsd_decay_style", ""))
@pytest.mark.parametrize("warmup_steps", [0, 1, 5])
def test_equals_megatron(style: dict[str, Any], warmup_steps: int) -> None:
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

    schedule = Schedule(
        max_lr=3e-4, min_lr=2e-5, init_lr=1e-6, warmup_steps=warmup_steps, decay_steps=23, weight_decay=0.1, **style
    )
    group: dict[str, float] = {}
    megatron = OptimizerParamScheduler(
        SimpleNamespace(param_groups=[group]),  # type: ignore[arg-type]
        init_lr=1e-6,
        max_lr=3e-4,
        min_lr=2e-5,
        lr_warmup_steps=warmup_steps,
        lr_decay_steps=23,
        lr_decay_style=style["decay_style"],
        start_wd=0.1,
        end_wd=0.1,
        wd_incr_steps=0,
        wd_incr_style="constant",
        wsd_decay_steps=style.get("wsd_decay_steps"),
        lr_wsd_decay_style=style.get("wsd_decay_style"),
    )
    for step in range(30):
        assert schedule.learning_rate(step) == pytest.approx(group["lr"], rel=1e-12), step
        assert schedule.weight_decay == group["weight_decay"]
        megatron.step(1)


def test_points_by_hand() -> None:
    linear = Schedule(max_lr=1.0, init_lr=0.2, min_lr=0.1, warmup_steps=4, decay_steps=14, decay_style="linear")
    assert [linear.learning_rate(s) for s in (0, 2, 4, 9, 14, 15)] == pytest.approx([0.2, 0.6, 1.0, 0.55, 0.1, 0.1])
    cosine = Schedule(max_lr=1.0, decay_steps=8, decay_style="cosine")
    assert [cosine.learning_rate(s) for s in (0, 2, 4, 8)] == pytest.approx([1, 0.853553, 0.5, 0])
    root = Schedule(max_lr=1.0, warmup_steps=4, decay_steps=100, decay_style="inverse-square-root")
    assert [root.learning_rate(s) for s in (4, 16, 64)] == pytest.approx([1, 0.5, 0.25])
    wsd = Schedule(max_lr=1.0, decay_steps=20, decay_style="WSD", wsd_decay_steps=4, wsd_decay_style="minus_sqrt")
    assert [wsd.learning_rate(s) for s in (0, 16, 17, 20)] == pytest.approx([1, 1, 0.5, 0])
    assert Schedule(max_lr=0.5).learning_rate(10**6) == 0.5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"decay_style": "cosin"}, "unknown decay_style 'cosin': use one of constant, linear"),
        ({"wsd_decay_style": "sqrt"}, "unknown wsd_decay_style 'sqrt'"),
        ({"min_lr": 2.0}, r"min_lr=2\.0 must not exceed the learning rate 1\.0"),
        ({"min_lr": -1.0}, "must not be negative"),
        ({"init_lr": 1.5}, r"init_lr=1\.5 must be between 0"),
        ({"max_lr": float("nan")}, "finite"),
        ({"weight_decay": -0.1}, "weight_decay=-0.1"),
        ({"warmup_steps": -1}, "warmup_steps=-1"),
        ({"decay_style": "linear", "warmup_steps": 9, "decay_steps": 9}, "must be less than decay_steps=9"),
        ({"decay_style": "WSD", "decay_steps": 9}, "wsd_decay_steps=0 must be between 1 and"),
        ({"decay_style": "WSD", "decay_steps": 9, "warmup_steps": 4, "wsd_decay_steps": 6}, "warmup_steps = 5"),
    ],
)
def test_rejects(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(TrainError, match=message):
        Schedule(**({"max_lr": 1.0} | changes))


def test_negative_step() -> None:
    with pytest.raises(ValueError, match="must not be negative, got -1"):
        Schedule(max_lr=1.0).learning_rate(-1)
