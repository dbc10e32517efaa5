"""Number formats and recomputation."""

from collections.abc import Iterable

from mbridge_config.plan.stages import planned_sizes
from mbridge_config.problems import Severity
from mbridge_config.rules.base import Context, Finding, rule
from mbridge_config.rules.parallel import FIRST_STAGE, LAST_STAGE, PP

PRECISION = "actor.model.precision"
GRANULARITY = "actor.model.recompute_granularity"
METHOD = "actor.model.recompute_method"
RECOMPUTED = "actor.model.recompute_num_layers"
OPTIM = "actor.optim."
PRECISION_AWARE = "actor.optim.use_precision_aware_optimizer"


@rule("precision-conflict", PRECISION, f"{OPTIM}bf16", f"{OPTIM}fp16", PRECISION_AWARE)
def precision(context: Context) -> Iterable[Finding]:
    """The optimizer's number format differs from the model's. If that was meant for Megatron-Core's precision-aware
    optimizer, this version does not have it.

    Fix: remove `actor.optim.bf16` and `actor.optim.fp16`; they follow `actor.model.precision`.
    """
    actor = context.config.actor
    for name in ("bf16", "fp16"):
        value, expected = getattr(actor.optim, name), actor.model.precision == name
        if value != expected:
            spelled = str(expected).lower()
            reason = f"{PRECISION} is {actor.model.precision}"
            fix = f"set {OPTIM}{name}={spelled}, remove it, or change {PRECISION}"
            if expected and context.value(PRECISION_AWARE):
                reason += (
                    f", and the precision-aware optimizer ({PRECISION_AWARE}), which needs this switch off, "
                    "is not in this version: master weights and moments are kept in fp32"
                )
                fix = f"remove both keys, or set {OPTIM}{name}={spelled}"
            yield Finding(f"{OPTIM}{name}", reason, fix)


@rule("loss-scale-without-fp16", PRECISION, f"{OPTIM}loss_scale")
def loss_scale(context: Context) -> Iterable[Finding]:
    """A loss scale is set, but only fp16 uses one.

    Fix: remove the key.
    """
    actor = context.config.actor
    if actor.optim.loss_scale is not None and actor.model.precision != "fp16":
        reason = f"only fp16 scales the loss, and {PRECISION} is {actor.model.precision}"
        yield Finding(f"{OPTIM}loss_scale", reason, "remove it", Severity.WARNING)


@rule("loss-scale-range", f"{OPTIM}initial_loss_scale", f"{OPTIM}min_loss_scale")
def loss_scale_range(context: Context) -> Iterable[Finding]:
    """The loss scale would start below its lowest value.

    Fix: raise `actor.optim.initial_loss_scale`, or lower `actor.optim.min_loss_scale`.
    """
    optim = context.config.actor.optim
    if optim.initial_loss_scale < optim.min_loss_scale:
        reason = f"below min_loss_scale {optim.min_loss_scale:g}"
        yield Finding(f"{OPTIM}initial_loss_scale", reason, f"use {optim.min_loss_scale:g} or more")


@rule("recompute", GRANULARITY, METHOD, RECOMPUTED)
def recompute(context: Context) -> Iterable[Finding]:
    """The recompute settings do not fit together: full needs a method and a number of layers, selective takes neither
    number, and without a granularity nothing is recomputed.

    Fix: give `full` a method and a number of layers, and `selective` no number.
    """
    model = context.config.actor.model
    if model.recompute_granularity == "full":
        if model.recompute_method is None:
            yield Finding(METHOD, f"{GRANULARITY} full needs a method", f"set {METHOD}=uniform or block")
        if model.recompute_num_layers is None:
            yield Finding(RECOMPUTED, f"{GRANULARITY} full needs a number of layers", f"set {RECOMPUTED}=1 or more")
    elif model.recompute_granularity == "selective":
        if model.recompute_num_layers is not None:
            reason = f"{GRANULARITY} selective recomputes attention in all layers"
            yield Finding(RECOMPUTED, reason, f"remove {RECOMPUTED}, or set {GRANULARITY}=full")
    else:
        for key, value in ((METHOD, model.recompute_method), (RECOMPUTED, model.recompute_num_layers)):
            if value is not None:
                reason = f"{GRANULARITY} is null, so nothing is recomputed"
                yield Finding(key, reason, f"set {GRANULARITY}=full, or remove {key}", Severity.WARNING)


@rule("recompute-layers", RECOMPUTED, GRANULARITY, PP, FIRST_STAGE, LAST_STAGE)
def recompute_layers(context: Context) -> Iterable[Finding]:
    """More layers are to be recomputed than a pipeline stage has.

    Fix: use the number of layers that a stage has, or less.
    """
    model, facts = context.config.actor.model, context.facts
    if facts is None or model.recompute_granularity != "full" or model.recompute_num_layers is None:
        return
    sizes = planned_sizes(model, facts)
    if sizes is None:
        return
    stage = max(sizes)
    if model.recompute_num_layers > stage:
        reason = f"a pipeline stage has {stage} layers"
        yield Finding(RECOMPUTED, reason, f"use {stage} or less", Severity.WARNING)
