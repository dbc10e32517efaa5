"""The optimizer and its learning rate."""

from collections.abc import Iterable

from mbridge_config.problems import Severity
from mbridge_config.rules.base import Context, Finding, rule
from mbridge_config.run.steps import LENGTH_KEYS, decay_steps, longest_run, warmup_steps
from mbridge_config.schema.actor import LrScheduleConfig

OPTIM = "actor.optim."
SCHEDULE = "actor.lr_sched."
STYLE = "actor.lr_sched.lr_decay_style"
DECAY = "actor.lr_sched.lr_decay_iters"
WARMUP = "actor.lr_sched.lr_warmup_iters"
FRACTION = "actor.lr_sched.lr_warmup_fraction"
LAST_DECAY = "actor.lr_sched.lr_wsd_decay_iters"
SCHEDULE_KEYS = (STYLE, DECAY, WARMUP, FRACTION, LAST_DECAY)


@rule("learning-rate-twice", f"{OPTIM}lr", f"{SCHEDULE}max_lr")
def learning_rate(context: Context) -> Iterable[Finding]:
    """optim.lr and lr_sched.max_lr are both set and differ; the schedule's is used.

    Fix: make them equal, or remove one.
    """
    actor, provenance = context.config.actor, context.config.provenance
    if provenance.was_set(f"{OPTIM}lr") and actor.optim.lr != actor.lr_sched.max_lr:
        reason = f"{SCHEDULE}max_lr {actor.lr_sched.max_lr:g} is used"
        yield Finding(f"{OPTIM}lr", reason, "make them equal, or remove one", Severity.WARNING)


@rule("lowest-learning-rate", f"{SCHEDULE}min_lr", f"{SCHEDULE}max_lr", f"{OPTIM}lr", f"{OPTIM}min_lr")
def lowest(context: Context) -> Iterable[Finding]:
    """The learning rate would end above where it starts.

    Fix: lower `min_lr` or `lr_warmup_init`, or raise `max_lr`.
    """
    schedule = context.config.actor.lr_sched
    if schedule.min_lr > schedule.max_lr:
        reason = f"above the highest learning rate {schedule.max_lr:g}"
        yield Finding(f"{SCHEDULE}min_lr", reason, f"use {schedule.max_lr:g} or less")
    if schedule.lr_warmup_init > schedule.max_lr:
        reason = f"above the highest learning rate {schedule.max_lr:g}"
        yield Finding(f"{SCHEDULE}lr_warmup_init", reason, f"use {schedule.max_lr:g} or less")


@rule("weight-decay-schedule", *(f"{SCHEDULE}{name}_weight_decay" for name in ("start", "end")), f"{OPTIM}weight_decay")
def weight_decay(context: Context) -> Iterable[Finding]:
    """The weight decay is to change over the run, or is given twice with different values.

    Fix: give one weight decay.
    """
    actor, provenance = context.config.actor, context.config.provenance
    start, end = actor.lr_sched.start_weight_decay, actor.lr_sched.end_weight_decay
    if start != end:
        reason = f"weight decay is constant in this version, and {SCHEDULE}start_weight_decay is {start:g}"
        yield Finding(f"{SCHEDULE}end_weight_decay", reason, f"set it to {start:g}, or remove it")
    if provenance.was_set(f"{OPTIM}weight_decay") and actor.optim.weight_decay != start:
        reason = f"{SCHEDULE}start_weight_decay {start:g} is used"
        yield Finding(f"{OPTIM}weight_decay", reason, "make them equal, or remove one", Severity.WARNING)


@rule(
    "overlap",
    *(f"{OPTIM}{name}" for name in ("use_distributed_optimizer", "overlap_grad_reduce", "overlap_param_gather")),
)
def overlap(context: Context) -> Iterable[Finding]:
    """overlap_param_gather needs the distributed optimizer and overlap_grad_reduce.

    Fix: set `use_distributed_optimizer` and `overlap_grad_reduce` as well, or leave it off.
    """
    optim, key = context.config.actor.optim, f"{OPTIM}overlap_param_gather"
    if not optim.overlap_param_gather:
        return
    if not optim.use_distributed_optimizer:
        yield Finding(
            key, "only the distributed optimizer gathers weights", f"set {OPTIM}use_distributed_optimizer=true"
        )
    elif not optim.overlap_grad_reduce:
        yield Finding(key, "it needs overlap_grad_reduce", f"set {OPTIM}overlap_grad_reduce=true, or {key}=false")


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
