"""All rules, by the kind of run they are for."""

from mbridge_config.rules import batches, geometry, lengths, optimizer, parallel, run, start
from mbridge_config.rules.base import Context, Finding, Rule, rule

REASONING: tuple[Rule, ...] = (
    *start.RULES,
    *geometry.RULES,
    *parallel.RULES,
    *batches.RULES,
    *lengths.RULES,
    *optimizer.RULES,
    *run.RULES,
)

__all__ = ["REASONING", "Context", "Finding", "Rule", "rule"]
