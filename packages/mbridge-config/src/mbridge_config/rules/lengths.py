"""Lengths of prompts, answers and sequences, all in tokens."""

from collections.abc import Iterable

from mbridge_config.problems import Severity
from mbridge_config.rules.base import Context, Finding, rule

SEQUENCE = "runner.seq_length"
PROMPT = "data.max_prompt_length"
NEW = "algorithm.sampling_params.max_new_tokens"
LEAST = "algorithm.sampling_params.min_new_tokens"
MODEL = "actor.model.seq_length"
BUDGET = "runner.max_tokens_per_mbs"


@rule("prompt-length", SEQUENCE, PROMPT)
def prompt(context: Context) -> Iterable[Finding]:
    """A prompt of the allowed length leaves no room for an answer."""
    longest, allowed = context.config.runner.seq_length, context.config.data.max_prompt_length
    if allowed >= longest:
        reason = f"a prompt of {allowed} tokens leaves no room for an answer in {SEQUENCE} {longest}"
        yield Finding(PROMPT, reason, f"set {PROMPT} below {longest}, or raise {SEQUENCE}")


@rule("answer-length", SEQUENCE, PROMPT, NEW)
def answer(context: Context) -> Iterable[Finding]:
    """The longest prompt and the longest answer together are longer than a sequence may be."""
    longest, allowed = context.config.runner.seq_length, context.config.data.max_prompt_length
    new = context.config.algorithm.sampling_params.max_new_tokens
    if allowed < longest < allowed + new:
        reason = f"{PROMPT} {allowed} + {new} new tokens = {allowed + new}, more than {SEQUENCE} {longest}"
        fix = f"set {NEW} to {longest - allowed} or less, or write ${{subtract:${{{SEQUENCE}}},${{{PROMPT}}}}}"
        yield Finding(NEW, reason, fix)


@rule("least-answer-length", NEW, LEAST)
def least_answer(context: Context) -> Iterable[Finding]:
    """The shortest allowed answer is longer than the longest."""
    sampling = context.config.algorithm.sampling_params
    if sampling.min_new_tokens > sampling.max_new_tokens:
        yield Finding(LEAST, f"more than {NEW} {sampling.max_new_tokens}", f"use {sampling.max_new_tokens} or less")


@rule("model-sequence-length", SEQUENCE, MODEL)
def model_length(context: Context) -> Iterable[Finding]:
    """The model is built for sequences shorter than those of the run."""
    longest, built = context.config.runner.seq_length, context.config.actor.model.seq_length
    if built < longest:
        yield Finding(MODEL, f"less than {SEQUENCE} {longest}", f"remove it, or write ${{{SEQUENCE}}}")


@rule("position-embeddings", SEQUENCE)
def positions(context: Context) -> Iterable[Finding]:
    """Sequences may be longer than those the model was trained for."""
    longest, facts = context.config.runner.seq_length, context.facts
    if facts is not None and facts.max_position_embeddings is not None and longest > facts.max_position_embeddings:
        made = facts.max_position_embeddings
        reason = f"more than the {made} positions of the model (max_position_embeddings in config.json)"
        yield Finding(SEQUENCE, reason, f"use {made} or less", Severity.WARNING)


@rule("dynamic-batch-tokens", "runner.enable_dynamic_batch_size", BUDGET, SEQUENCE)
def budget(context: Context) -> Iterable[Finding]:
    """A sequence of the allowed length does not fit into a micro-batch of a dynamic batch."""
    runner = context.config.runner
    if runner.enable_dynamic_batch_size and runner.max_tokens_per_mbs < runner.seq_length:
        reason = f"one sequence of {SEQUENCE} {runner.seq_length} tokens does not fit"
        yield Finding(BUDGET, reason, f"use {runner.seq_length} or more")


RULES = (prompt, answer, least_answer, model_length, positions, budget)
