"""Count the steps of a run: its length, its learning rate's warm-up and decay, and what the profiler records.

Rules, apps and the engine all count here, so that they agree.
"""

import dataclasses
from typing import Any

from mbridge_config.schema.actor import LrScheduleConfig, ProfilerConfig
from mbridge_config.schema.sft import SFTConfig

LENGTH_KEYS = (
    "runner.max_steps",
    "runner.max_epochs",
    "data.type",
    "data.reasoning_gym.train_size",
    "data.rollout_batch_size",
    "algorithm.n_minibatches",
    "algorithm.group_size",
    "actor.global_batch_size",
)
"""The keys that decide the length of a run; no kind of run has all of them."""


@dataclasses.dataclass(kw_only=True, slots=True, frozen=True)
class RunLength:
    """Training steps of a whole run, and the optimizer steps in them.

    `reason` names the keys that decide it, for messages.
    """

    steps: int
    optimizer_steps: int
    reason: str


def run_length(config: Any, *, rows: int) -> RunLength:
    """Return the length of a run that trains on `rows` rows or problems.

    It ends with `runner.max_steps` or `runner.max_epochs`, whichever is reached first. Batches continue across the end
    of an epoch, so only the last one is dropped if it is incomplete; there is at least one step.
    """
    limits = [limit for limit in (_by_steps(config), _by_epochs(config, rows)) if limit is not None]
    return min(limits, key=lambda limit: limit.steps)


def longest_run(config: Any, rows: int | None = None) -> RunLength | None:
    """Return the longest run that the config alone allows; None if the data decides, which is not read here."""
    data = config.data
    if rows is None and not isinstance(config, SFTConfig) and data.type == "reasoning_gym":
        rows = data.reasoning_gym.train_size
    return _by_steps(config) if rows is None else run_length(config, rows=rows)


def _by_steps(config: Any) -> RunLength | None:
    steps = config.runner.max_steps
    return None if steps < 1 else _length(config, steps, f"runner.max_steps {steps}")


def _by_epochs(config: Any, rows: int) -> RunLength | None:
    runner = config.runner
    if runner.max_epochs is None and runner.max_steps > 0:
        return None
    epochs = runner.max_epochs or 1
    size, key = config.actor.global_batch_size, "actor.global_batch_size"
    if not isinstance(config, SFTConfig):
        size, key = config.data.rollout_batch_size, "data.rollout_batch_size"
    steps = max(1, rows * epochs // size)
    reason = f"{_many(steps, 'step')} of {key} {size} in runner.max_epochs {epochs} of {_many(rows, 'row')}"
    return _length(config, steps, reason)


def _length(config: Any, steps: int, reason: str) -> RunLength:
    if isinstance(config, SFTConfig):
        return RunLength(steps=steps, optimizer_steps=steps, reason=reason)
    minibatches = config.algorithm.n_minibatches
    total = steps * minibatches
    reason = f"algorithm.n_minibatches {minibatches} x {reason} = {_many(total, 'optimizer step')}"
    return RunLength(steps=steps, optimizer_steps=total, reason=reason)


def _many(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def decay_steps(schedule: LrScheduleConfig, optimizer_steps: int) -> int:
    """Return the optimizer step at which a run of `optimizer_steps` reaches the lowest rate."""
    return schedule.lr_decay_iters or max(1, optimizer_steps)


def warmup_steps(schedule: LrScheduleConfig, decay_steps: int) -> int:
    """Return the optimizer steps of the warm-up of a schedule that ends after `decay_steps`."""
    if schedule.lr_warmup_fraction is None:
        return schedule.lr_warmup_iters
    return int(schedule.lr_warmup_fraction * decay_steps)


def is_recorded(settings: ProfilerConfig, step: int) -> bool:
    """Return whether the profiler records `step`, counted from 1."""
    if settings.steps is not None:
        return step in settings.steps
    idle = settings.schedule_wait + settings.schedule_warmup
    cycle, place = divmod(step - 1, idle + settings.schedule_active)
    return place >= idle and (not settings.schedule_repeat or cycle < settings.schedule_repeat)


def is_warmup(settings: ProfilerConfig, step: int) -> bool:
    """Return whether the profiler runs in `step` without recording it."""
    ahead = range(step + 1, step + 1 + settings.schedule_warmup)
    return not is_recorded(settings, step) and any(is_recorded(settings, later) for later in ahead)
