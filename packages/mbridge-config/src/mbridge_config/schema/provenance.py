"""Record where the values of a config came from, and what was wrong with them."""

import dataclasses
from typing import Any

from mbridge_config.problems import Problem, Severity, Where, json_ready


@dataclasses.dataclass(kw_only=True, slots=True)
class Provenance:
    """What composing a config leaves behind beside its values.

    `places` has an entry for each key and section that a file or argument set, under its full name. `failed` holds the
    keys whose value could not be used and that have their default instead; a rule that reads one of them is skipped, so
    that one mistake is reported once. `compat` holds the values of keys that the schema does not have (`compat.keys`).
    """

    places: dict[str, Where] = dataclasses.field(default_factory=dict)
    failed: set[str] = dataclasses.field(default_factory=set)
    problems: list[Problem] = dataclasses.field(default_factory=list)
    compat: dict[str, Any] = dataclasses.field(default_factory=dict)

    def was_set(self, key: str) -> bool:
        """Return whether a file or an argument set `key`."""
        return key in self.places

    def where(self, key: str | None) -> Where | None:
        """Return the place of `key`, or of the nearest section around it that was set."""
        while key:
            if key in self.places:
                return self.places[key]
            key = key.rpartition(".")[0]
        return None

    def report(
        self, identity: str, key: str | None, value: Any, reason: str, fix: str, severity: Severity = Severity.ERROR
    ) -> None:
        """Add a problem with `value` to `problems`, at the place of `key`."""
        where, value = self.where(key), json_ready(value)
        problem = Problem(id=identity, key=key, value=value, reason=reason, fix=fix, severity=severity, where=where)
        self.problems.append(problem)
