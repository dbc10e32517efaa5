"""Explain every problem id: cause and fix. Rules say theirs in docstrings, `explanations.toml` has the others."""

import collections
import dataclasses
import tomllib
from pathlib import Path

from mbridge_config.rules import REASONING, SFT

LOADING = tomllib.loads(Path(__file__).with_name("explanations.toml").read_text(encoding="utf-8"))
"""Cause and fix of the problems that no rule finds."""


@dataclasses.dataclass(kw_only=True, slots=True, frozen=True)
class Explanation:
    """What a problem id means. `runs` is reasoning or sft where the id means something else in the other."""

    id: str
    cause: str
    fix: str
    runs: str | None = None


def explanations() -> dict[str, list[Explanation]]:
    """Return all explanations by id, in alphabetical order."""
    rules = dict.fromkeys((*REASONING, *SFT))
    uses = collections.Counter(rule.id for rule in rules)
    found = {identity: [Explanation(id=identity, **texts)] for identity, texts in LOADING.items()}
    for rule in rules:
        kind = "reasoning" if rule in REASONING else "sft"
        runs = kind if uses[rule.id] > 1 else None
        found.setdefault(rule.id, []).append(Explanation(id=rule.id, cause=rule.cause, fix=rule.fix, runs=runs))
    return dict(sorted(found.items()))
