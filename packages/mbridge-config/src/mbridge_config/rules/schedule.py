"""The lengths of the learning rate's schedule: its warm-up and its decay, in themselves and against the run's."""

from collections.abc import Iterable

from mbridge_config.rules.base import Context, Finding, rule
from mbridge_config.run.length import LENGTH_KEYS, longest_run
from mbridge_config.run.schedule_lengths import decay_steps, warmup_steps
from mbridge_config.schema.optimizer import LrScheduleConfig

STYLE = "actor.lr_sched.lr_decay_style"
DECAY = "actor.lr_sched.lr_decay_iters"
WARMUP = "actor.lr_sched.lr_warmup_iters"
FRACTION = "actor.lr_sched.lr_warmup_fraction"
LAST_DECAY = "actor.lr_sched.lr_wsd_decay_iters"
SCHEDULE_KEYS = (STYLE, DECAY, WARMUP, FRACTION, LAST_DECAY)


@rule("schedule-lengths", *SCHEDULE_KEYS)
def lengths(context: Context) -> Iterable[Finding]:
    """The rate decays, and its warm-up takes all of `lr_decay_iters`, or WSD has no length for its last decay, or one
    that is longer than what the warm-up leaves.

    Fix: shorten the warm-up or the last decay, raise `lr_decay_iters`, or give WSD its `lr_wsd_decay_iters`.
    """
    schedule = context.config.actor.lr_sched
    if schedule.lr_decay_style == "constant":
        return
    if schedule.lr_warmup_fraction is not None and schedule.lr_warmup_fraction >= 1:
        reason = "the warm-up would take the whole schedule, and nothing is left to decay in"
        yield Finding(FRACTION, reason, f"use less than 1, or set {STYLE}=constant")
    if schedule.lr_decay_style == "WSD" and schedule.lr_wsd_decay_iters is None:
        yield Finding(LAST_DECAY, "WSD needs the length of its last decay", f"set {LAST_DECAY}")
    if (total := schedule.lr_decay_iters) is not None:
        yield from _too_long(schedule, total, f"lr_decay_iters {total}", f"or raise {DECAY}")


@rule("warmup-length", *SCHEDULE_KEYS, *LENGTH_KEYS)
def over_the_run(context: Context) -> Iterable[Finding]:
    """The rate decays over the whole run, and the warm-up is not shorter than that, or WSD's last decay is longer than
    what the warm-up leaves.

    Fix: shorten the warm-up or the last decay, train for longer, or set `actor.lr_sched.lr_decay_iters`.
    """
    schedule, run = context.config.actor.lr_sched, longest_run(context.config, context.rows)
    if schedule.lr_decay_style == "constant" or schedule.lr_decay_iters is not None or run is None:
        return
    total = decay_steps(schedule, run.optimizer_steps)
    whole = f"the run, over which the rate decays: {run.reason}"
    yield from _too_long(schedule, total, whole, f"train for longer, or set {DECAY}")


def _too_long(schedule: LrScheduleConfig, total: int, whole: str, otherwise: str) -> Iterable[Finding]:
    """What does not fit into the `total` optimizer steps of `whole`."""
    warmup, last = warmup_steps(schedule, total), schedule.lr_wsd_decay_iters
    left = total - warmup
    if left < 1:
        if schedule.lr_warmup_fraction is None:  # a whole share is too long for any run
            yield Finding(WARMUP, f"not shorter than {whole}", f"use less than {total}, {otherwise}")
    elif schedule.lr_decay_style == "WSD" and last is not None and last > left:
        reason = f"longer than {whole}"
        if warmup:
            key = WARMUP if schedule.lr_warmup_fraction is None else FRACTION
            name = key.rpartition(".")[2]
            many = "1 step" if left == 1 else f"{left} steps"
            reason = f"longer than the {many} that {name} {getattr(schedule, name)} leaves of {whole}"
        yield Finding(LAST_DECAY, reason, f"use {left} or less, {otherwise}")


RULES = (lengths, over_the_run)
