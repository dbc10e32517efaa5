"""Ranks against the model: heads, layers, world size."""

from collections.abc import Iterable

from mbridge_config.facts.model import HFFacts
from mbridge_config.plan.stages import planned_sizes, stage_sizes
from mbridge_config.problems import Severity
from mbridge_config.rules.base import Context, Finding, rule
from mbridge_config.schema.actor import ModelConfig

TP = "actor.model.tensor_model_parallel_size"
PP = "actor.model.pipeline_model_parallel_size"
CP = "actor.model.context_parallel_size"
EP = "actor.model.expert_model_parallel_size"
ETP = "actor.model.expert_tensor_parallel_size"
FIRST_STAGE = "actor.model.num_layers_in_first_pipeline_stage"
LAST_STAGE = "actor.model.num_layers_in_last_pipeline_stage"
_ENDS = {"first": FIRST_STAGE, "last": LAST_STAGE}
VPP = "actor.model.virtual_pipeline_model_parallel_size"
SP = "actor.model.sequence_parallel"
# Their angles interleave time, height and width; their vision tower is split over the tensor-parallel ranks.
QWEN3_VL = ("qwen3_vl", "qwen3_vl_text", "qwen3_vl_moe", "qwen3_vl_moe_text")


def divisors(number: int, limit: int) -> list[int]:
    """Return the divisors of `number` up to `limit`."""
    return [n for n in range(1, min(number, limit) + 1) if number % n == 0]


def tensor_sizes(facts: HFFacts) -> str:
    """The tensor-parallel sizes that pass the rules on all that is shared, as text."""
    heads, groups = facts.num_attention_heads, facts.num_query_groups
    shared = [number for number, _ in (*mlp_widths(facts), *tower_sizes(facts))]
    fitting = (n for n in divisors(heads, 64) if groups % n == 0 or n % groups == 0)
    return ", ".join(str(n) for n in fitting if not any(number % n for number in shared))


def mlp_widths(facts: HFFacts) -> list[tuple[int, str]]:
    """Widths of the model's MLPs, and what they are widths of."""
    widths = ((facts.ffn_hidden_size, "MLP"), (facts.expert_ffn_hidden_size, "experts'"))
    return [(width, what) for width, what in widths if width is not None]


def tower_sizes(facts: HFFacts) -> list[tuple[int, str]]:
    """What the tensor-parallel ranks share of a vision tower, if they share it: numbers, and what they count."""
    sizes = ((facts.vision_heads, "attention heads"), (facts.vision_ffn_hidden_size, "MLP columns"))
    return [(size, what) for size, what in sizes if size and facts.model_type in QWEN3_VL]


@rule("tensor-parallel-heads", TP)
def heads(context: Context) -> Iterable[Finding]:
    """The query heads cannot be shared evenly by the tensor-parallel ranks.

    Fix: use a divisor of the model's attention heads.
    """
    facts, tensor = context.facts, context.config.actor.model.tensor_model_parallel_size
    if facts is not None and facts.num_attention_heads % tensor:
        reason = f"the model's {facts.num_attention_heads} attention heads cannot be shared by {tensor} ranks"
        yield Finding(TP, reason, f"use one of {tensor_sizes(facts)}")


@rule("tensor-parallel-kv-groups", TP)
def kv_groups(context: Context) -> Iterable[Finding]:
    """The key and value heads are neither a multiple nor a divisor of the tensor-parallel ranks, which Megatron-Core
    needs to share or repeat them.

    Fix: use a multiple or a divisor of the model's key-value heads.
    """
    facts, tensor = context.facts, context.config.actor.model.tensor_model_parallel_size
    if facts is not None and facts.num_query_groups % tensor and tensor % facts.num_query_groups:
        yield Finding(
            TP,
            f"the model's {facts.num_query_groups} key-value heads (groups) are neither a multiple nor a divisor of "
            f"{tensor} ranks",
            f"use one of {tensor_sizes(facts)}",
        )


@rule("tensor-parallel-ffn", TP)
def ffn(context: Context) -> Iterable[Finding]:
    """The width of the MLP, or of the experts, cannot be shared evenly by the tensor-parallel ranks.

    Fix: use a divisor of the width.
    """
    facts, tensor = context.facts, context.config.actor.model.tensor_model_parallel_size
    if facts is None:
        return
    for width, what in mlp_widths(facts):
        if width % tensor:
            reason = f"the model's {what} width {width} cannot be shared by {tensor} ranks"
            yield Finding(TP, reason, f"use one of {tensor_sizes(facts)}")


@rule("world-size", TP, PP)
def world_size(context: Context) -> Iterable[Finding]:
    """The number of ranks is not a multiple of tensor-parallel times pipeline-parallel ranks.

    Fix: start a multiple of tensor-parallel times pipeline-parallel ranks, or lower one of the two.
    """
    model, world = context.config.actor.model, context.world_size
    tensor, pipeline = model.tensor_model_parallel_size, model.pipeline_model_parallel_size
    if world is not None and world % (tensor * pipeline):
        yield Finding(
            TP,
            f"a world size of {world} is not a multiple of tensor {tensor} x pipeline {pipeline} = {tensor * pipeline}",
            f"start a multiple of {tensor * pipeline} ranks (launcher.nproc_per_node={tensor * pipeline} on one host), "
            f"or choose {TP} and {PP} whose product divides {world}",
        )


@rule("pipeline-parallel-layers", PP, FIRST_STAGE, LAST_STAGE)
def layers(context: Context) -> Iterable[Finding]:
    """The layers cannot be shared evenly by the pipeline stages.

    Fix: use a divisor of the model's layers, or give the first and the last stage layers of their own number with
    `num_layers_in_first_pipeline_stage` and `num_layers_in_last_pipeline_stage`.
    """
    facts, model = context.facts, context.config.actor.model
    if facts is None or _fixed_ends(model) or planned_sizes(model, facts) is not None:
        return
    pipeline = model.pipeline_model_parallel_size
    fix = f"use one of {', '.join(map(str, divisors(facts.num_layers, 64)))}"
    if pipeline <= facts.num_layers:
        first, last = _ends(facts.num_layers, pipeline)
        fix += f", or set {FIRST_STAGE}={first} {LAST_STAGE}={last}"
    yield Finding(PP, f"the model's {facts.num_layers} layers cannot be shared by {pipeline} stages", fix)


def _fixed_ends(model: ModelConfig) -> dict[str, int]:
    """Layers of the "first" and of the "last" stage, where they are set."""
    values = {"first": model.num_layers_in_first_pipeline_stage, "last": model.num_layers_in_last_pipeline_stage}
    return {end: value for end, value in values.items() if value is not None}


def _ends(layers: int, stages: int) -> tuple[int, int]:
    """Layers of the first and the last stage with which the others share the rest evenly: no more than theirs where
    that can be, since the ends also hold the embedding and the output layer."""
    between = stages - 2
    each = -(-layers // stages)
    if layers - between * each < 2:
        each = layers // stages
    rest = layers - between * each
    return -(-rest // 2), rest // 2


@rule("pipeline-split", FIRST_STAGE, LAST_STAGE, PP)
def split(context: Context) -> Iterable[Finding]:
    """The first or the last pipeline stage has a number of layers that leaves the other stages a rest which they cannot
    share evenly, at least one layer each; or there is only one stage.

    Fix: change the number so that the other stages can share the rest evenly, or remove it.
    """
    facts, model = context.facts, context.config.actor.model
    ends, stages = _fixed_ends(model), model.pipeline_model_parallel_size
    if stages == 1:
        for end in ends:
            yield Finding(_ENDS[end], f"the only stage has all layers, {PP} being 1", "remove the key")
    elif ends and facts is not None and planned_sizes(model, facts) is None:
        layers, others = facts.num_layers, stages - len(ends)
        rest = layers - sum(ends.values())
        stage = f"{others} other stage{'' if others == 1 else 's'}"
        reason = f"{' and '.join(f'{value} layers in the {end} stage' for end, value in ends.items())} "
        if others == 0:
            reason += f"do not make the model's {layers}"
        elif rest < others:
            reason += f"leave {max(rest, 0)} of the model's {layers} for {stage}, each of which needs one"
        else:
            reason += f"leave {rest} of the model's {layers}, which {stage} cannot share evenly"
        key = next(iter(ends))
        fitting = [n for n in range(1, min(layers, 1000)) if stage_sizes(layers, stages, **ends | {key: n})]
        nearest = min(fitting, key=lambda number: abs(number - ends[key]), default=None)
        fix = f"set {_ENDS[key]}={nearest}" if nearest else f"remove {' and '.join(_ENDS[end] for end in ends)}"
        yield Finding(_ENDS[key], reason, fix)


def _more_than_one(context: Context, key: str, value: int | None, what: str) -> Iterable[Finding]:
    if value is not None and value > 1:
        yield Finding(key, f"{what} is not built yet in this version of mbridge", f"set {key}=1, or remove it")


@rule("context-parallel-not-built", CP)
def context_parallel(context: Context) -> Iterable[Finding]:
    """Context parallelism was requested, which this version does not have.

    Fix: set the size to 1, or remove the key.
    """
    return _more_than_one(context, CP, context.config.actor.model.context_parallel_size, "context parallelism")


@rule("expert-parallel-not-built", EP, ETP)
def expert_parallel(context: Context) -> Iterable[Finding]:
    """Expert parallelism was requested, which this version does not have.

    Fix: set the sizes to 1, or remove the keys; tensor parallelism splits experts too.
    """
    model = context.config.actor.model
    yield from _more_than_one(context, EP, model.expert_model_parallel_size, "expert parallelism")
    yield from _more_than_one(context, ETP, model.expert_tensor_parallel_size, "expert tensor parallelism")


@rule("virtual-pipeline-not-built", VPP)
def virtual_pipeline(context: Context) -> Iterable[Finding]:
    """A virtual (interleaved) pipeline was requested, which this version does not have.

    Fix: remove the key.
    """
    value = context.config.actor.model.virtual_pipeline_model_parallel_size
    return _more_than_one(context, VPP, value, "a virtual pipeline")


@rule("sequence-parallel-without-tensor-parallel", SP, TP)
def sequence_parallel(context: Context) -> Iterable[Finding]:
    """Sequence parallelism splits activations over the tensor-parallel ranks, but there is only one.

    Fix: switch it off, or use more than one tensor-parallel rank.
    """
    model = context.config.actor.model
    if model.sequence_parallel and model.tensor_model_parallel_size == 1:
        reason = "it has no effect with one tensor-parallel rank"
        yield Finding(SP, reason, f"set {SP}=false, or {TP} above 1", Severity.WARNING)
