"""All rules, by the kind of run they are for."""

from mbridge_config.rules import (
    batches,
    geometry,
    lengths,
    optimizer,
    parallel,
    profiler,
    reasoning,
    run,
    schedule,
    sft,
    start,
    vision,
)
from mbridge_config.rules.base import Context, Finding, Rule, rule

_BOTH: tuple[Rule, ...] = (
    *start.RULES,
    *geometry.RULES,
    *parallel.RULES,
    *batches.RULES,
    *lengths.RULES,
    *optimizer.RULES,
    *schedule.RULES,
    *run.RULES,
    *profiler.RULES,
)

REASONING: tuple[Rule, ...] = (*_BOTH, *reasoning.RULES)

SFT: tuple[Rule, ...] = (*_BOTH, *vision.RULES, *sft.RULES)

__all__ = ["REASONING", "SFT", "Context", "Finding", "Rule", "rule"]
