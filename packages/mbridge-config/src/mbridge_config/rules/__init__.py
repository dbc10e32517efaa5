"""Refuse configs that cannot run: one small function per mistake, whose docstring gives the cause and the fix.

In: a config, and the facts of its model as far as they are known. Out: the rules of each kind of run.
Uses: `compat`, `facts`, `paths`, `plan`, `problems`, `run`, `schema`.
"""

from types import ModuleType

from mbridge_config.rules import batches, geometry, optimizer, parallel, precision, reasoning, run, sft, start
from mbridge_config.rules.base import Context, Finding, Rule, rule


def _rules_in(*modules: ModuleType) -> tuple[Rule, ...]:
    """Return the rules of `modules` in the order of their definition, which is that of messages of equal severity."""
    return tuple(value for module in modules for value in vars(module).values() if isinstance(value, Rule))


_BOTH = _rules_in(start, geometry, parallel, batches, precision, optimizer, run)
REASONING = (*_BOTH, *_rules_in(reasoning))
SFT = (*_BOTH, *_rules_in(sft))

__all__ = ["REASONING", "SFT", "Context", "Finding", "Rule", "rule"]
