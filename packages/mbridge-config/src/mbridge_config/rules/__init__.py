"""Refuse configs that cannot run: one small function per mistake, whose docstring gives the cause and the fix.

In: a config, and the facts of its model as far as they are known. Out: the rules of each kind of run.
Uses: `compat`, `facts`, `paths`, `plan`, `problems`, `run`, `schema`.
"""

from mbridge_config.rules import (
    batches,
    geometry,
    optimizer,
    parallel,
    precision,
    profiler,
    reasoning,
    run,
    sft,
    start,
)
from mbridge_config.rules.base import Context, Finding, Rule, rule

_BOTH: tuple[Rule, ...] = (
    *start.RULES,
    *geometry.RULES,
    *parallel.RULES,
    *batches.RULES,
    *precision.RULES,
    *optimizer.RULES,
    *run.RULES,
    *profiler.RULES,
)

REASONING: tuple[Rule, ...] = (*_BOTH, *reasoning.RULES)

SFT: tuple[Rule, ...] = (*_BOTH, *sft.RULES)

__all__ = ["REASONING", "SFT", "Context", "Finding", "Rule", "rule"]
