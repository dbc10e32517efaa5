"""The global batch against the ranks."""

from collections.abc import Iterable

from mbridge_config.rules.base import Context, Finding, rule
from mbridge_config.rules.parallel import PP, TP
from mbridge_config.schema.sft import SFTConfig

GLOBAL = "actor.global_batch_size"
MICRO = "actor.micro_batch_size"
DYNAMIC = "runner.enable_dynamic_batch_size"
# where it is not set in a reasoning run
_SETTERS = ("algorithm.n_minibatches", "data.rollout_batch_size", "algorithm.group_size")


@rule("global-batch-ranks", GLOBAL, MICRO, DYNAMIC, TP, PP)
def ranks(context: Context) -> Iterable[Finding]:
    """The global batch cannot be shared by the data-parallel ranks in whole micro-batches.

    Fix: make the global batch a multiple of data-parallel ranks times `actor.micro_batch_size`.
    """
    config, data = context.config, context.data_parallel
    if data is None:
        return
    actor = config.actor
    size, micro = actor.global_batch_size, actor.micro_batch_size
    if config.runner.enable_dynamic_batch_size:
        if size < data:
            reason = f"{size} sequences are too few for {data} data-parallel ranks"
            yield Finding(GLOBAL, reason, f"use {data} or more, or fewer ranks")
    elif size % (data * micro):
        derived = "" if isinstance(config, SFTConfig) else f" ({', '.join(_SETTERS[:-1])} and {_SETTERS[-1]} set it)"
        yield Finding(
            GLOBAL,
            f"{size} sequences are not a multiple of data-parallel {data} x {MICRO} {micro} = {data * micro}",
            f"make it a multiple of {data * micro}{derived}, or lower {MICRO}",
        )


RULES = (ranks,)
