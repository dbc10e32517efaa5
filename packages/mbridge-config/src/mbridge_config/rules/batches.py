"""Batch sizes against each other and against the ranks."""

from collections.abc import Iterable

from mbridge_config.problems import Severity
from mbridge_config.rules.base import Context, Finding, rule
from mbridge_config.rules.parallel import PP, TP

GLOBAL = "actor.global_batch_size"
MICRO = "actor.micro_batch_size"
GROUP = "algorithm.group_size"
MINIBATCHES = "algorithm.n_minibatches"
PROMPTS = "data.rollout_batch_size"
DYNAMIC = "runner.enable_dynamic_batch_size"


@rule("minibatches", MINIBATCHES, GROUP, PROMPTS, GLOBAL)
def minibatches(context: Context) -> Iterable[Finding]:
    """The answers of one step (rollout_batch_size x group_size) cannot be cut into equal minibatches, or
    global_batch_size and n_minibatches say different things."""
    config = context.config
    count, size = config.algorithm.n_minibatches, config.actor.global_batch_size
    prompts, group = config.data.rollout_batch_size, config.algorithm.group_size
    answers = prompts * group
    spelled = f"{PROMPTS} {prompts} x {GROUP} {group} = {answers} answers a step"
    if not config.origin.was_set(GLOBAL) or config.origin.was_set(MINIBATCHES):
        if answers % count:
            yield Finding(
                MINIBATCHES, f"{spelled} cannot be cut into {count} equal minibatches", f"use a divisor of {answers}"
            )
        elif size * count != answers:
            yield Finding(
                GLOBAL,
                f"{spelled} in {MINIBATCHES} {count} minibatches make {answers // count} each, not {size}",
                f"set {GLOBAL}={answers // count}, or remove it or {MINIBATCHES}",
            )
    elif answers % size:
        yield Finding(GLOBAL, f"{spelled} are not a multiple of it", f"use a divisor of {answers}")


@rule("global-batch-ranks", GLOBAL, MICRO, DYNAMIC, TP, PP)
def ranks(context: Context) -> Iterable[Finding]:
    """The global batch cannot be shared by the data-parallel ranks in whole micro-batches."""
    actor, data = context.config.actor, context.data_parallel
    if data is None:
        return
    size, micro = actor.global_batch_size, actor.micro_batch_size
    if context.config.runner.enable_dynamic_batch_size:
        if size < data:
            reason = f"{size} sequences are too few for {data} data-parallel ranks"
            yield Finding(GLOBAL, reason, f"use {data} or more, or fewer ranks")
    elif size % (data * micro):
        yield Finding(
            GLOBAL,
            f"{size} sequences are not a multiple of data-parallel {data} x {MICRO} {micro} = {data * micro}",
            f"make it a multiple of {data * micro} ({MINIBATCHES}, {PROMPTS} and {GROUP} set it), or lower {MICRO}",
        )


@rule("group-of-one", GROUP)
def group_of_one(context: Context) -> Iterable[Finding]:
    """Rewards are compared within a group of answers to one prompt, and a group has one answer."""
    if context.config.algorithm.group_size == 1:
        reason = "GRPO compares the answers of a group; with one answer every advantage is 0"
        yield Finding(GROUP, reason, f"set {GROUP} to 2 or more")


@rule("greedy-group", "algorithm.sampling_params.use_greedy", GROUP)
def greedy_group(context: Context) -> Iterable[Finding]:
    """Greedy decoding gives every answer of a group the same text."""
    algorithm = context.config.algorithm
    if algorithm.sampling_params.use_greedy and algorithm.group_size > 1:
        reason = "greedy answers to one prompt are all the same, so every advantage is 0"
        key = "algorithm.sampling_params.use_greedy"
        yield Finding(key, reason, f"set {key}=false", Severity.WARNING)


RULES = (minibatches, ranks, group_of_one, greedy_group)
