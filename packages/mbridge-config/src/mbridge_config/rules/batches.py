"""Batches against the ranks, and sequences against the model."""

from collections.abc import Iterable

from mbridge_config.problems import Severity
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


SEQUENCE = "runner.seq_length"
MODEL = "actor.model.seq_length"
BUDGET = "runner.max_tokens_per_mbs"


@rule("model-sequence-length", SEQUENCE, MODEL)
def model_length(context: Context) -> Iterable[Finding]:
    """The model is built for sequences shorter than those of the run.

    Fix: remove `actor.model.seq_length`; it is then `runner.seq_length`.
    """
    longest, built = context.config.runner.seq_length, context.config.actor.model.seq_length
    if built < longest:
        yield Finding(MODEL, f"less than {SEQUENCE} {longest}", f"remove it, or write ${{{SEQUENCE}}}")


@rule("position-embeddings", SEQUENCE)
def positions(context: Context) -> Iterable[Finding]:
    """Sequences may be longer than those the model was trained for. With `rope_type: dynamic` that is an error, since
    the rotary frequencies would then depend on the length of the batch.

    Fix: lower `runner.seq_length`.
    """
    longest, facts = context.config.runner.seq_length, context.facts
    if facts is not None and facts.max_position_embeddings is not None and longest > facts.max_position_embeddings:
        made = facts.max_position_embeddings
        reason = f"more than the {made} positions of the model (max_position_embeddings in config.json)"
        severity = Severity.WARNING
        if facts.rope_type == "dynamic":
            severity, reason = Severity.ERROR, f"{reason}; beyond them rope_type 'dynamic' changes with the batch"
        yield Finding(SEQUENCE, reason, f"use {made} or less", severity)


@rule("dynamic-batch-tokens", "runner.enable_dynamic_batch_size", BUDGET, SEQUENCE)
def budget(context: Context) -> Iterable[Finding]:
    """A sequence of the allowed length does not fit into a micro-batch of a dynamic batch.

    Fix: raise `runner.max_tokens_per_mbs` to `runner.seq_length` or more.
    """
    runner = context.config.runner
    if runner.enable_dynamic_batch_size and runner.max_tokens_per_mbs < runner.seq_length:
        reason = f"one sequence of {SEQUENCE} {runner.seq_length} tokens does not fit"
        yield Finding(BUDGET, reason, f"use {runner.seq_length} or more")
