"""Lengths of sequences, in tokens."""

from collections.abc import Iterable

from mbridge_config.problems import Severity
from mbridge_config.rules.base import Context, Finding, rule

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
    """Sequences may be longer than those the model was trained for.

    Fix: lower `runner.seq_length`.
    """
    longest, facts = context.config.runner.seq_length, context.facts
    if facts is not None and facts.max_position_embeddings is not None and longest > facts.max_position_embeddings:
        made = facts.max_position_embeddings
        reason = f"more than the {made} positions of the model (max_position_embeddings in config.json)"
        yield Finding(SEQUENCE, reason, f"use {made} or less", Severity.WARNING)


@rule("dynamic-batch-tokens", "runner.enable_dynamic_batch_size", BUDGET, SEQUENCE)
def budget(context: Context) -> Iterable[Finding]:
    """A sequence of the allowed length does not fit into a micro-batch of a dynamic batch.

    Fix: raise `runner.max_tokens_per_mbs` to `runner.seq_length` or more.
    """
    runner = context.config.runner
    if runner.enable_dynamic_batch_size and runner.max_tokens_per_mbs < runner.seq_length:
        reason = f"one sequence of {SEQUENCE} {runner.seq_length} tokens does not fit"
        yield Finding(BUDGET, reason, f"use {runner.seq_length} or more")


RULES = (model_length, positions, budget)
