"""Define a rule: a pure function from a `Context` to its findings, with a stable id."""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

from mbridge_config.compat.keys import value_of
from mbridge_config.facts.model import HFFacts
from mbridge_config.problems import Problem, Severity, json_ready


@dataclasses.dataclass(kw_only=True, slots=True, frozen=True)
class Context:
    """Everything that rules look at. Apart from the config, each field is None if it is unknown.

    `rows` is the number of rows to train on, which is known once an app has read them.
    """

    config: Any
    facts: HFFacts | None = None
    tokenizer_size: int | None = None
    world_size: int | None = None
    rows: int | None = None

    def value(self, key: str) -> Any:
        """Return the value of a key, also of one that the schema does not have."""
        return value_of(self.config, key)

    @property
    def data_parallel(self) -> int | None:
        """Return the number of data-parallel ranks; None if the world size is unknown or not divisible."""
        model = self.config.actor.model
        share: int = model.tensor_model_parallel_size * model.pipeline_model_parallel_size
        if self.world_size is None or self.world_size % share:
            return None
        return self.world_size // share


@dataclasses.dataclass(slots=True, frozen=True)
class Finding:
    """What is wrong with `key`, and how to fix it."""

    key: str
    reason: str
    fix: str
    severity: Severity = Severity.ERROR


def _words(text: str) -> str:
    return " ".join(text.split())


Check = Callable[[Context], Iterable[Finding]]


@dataclasses.dataclass(kw_only=True, slots=True, frozen=True)
class Rule:
    """A check, its id, and the keys it reads.

    The docstring of the check becomes the reference of errors: the cause, and after "Fix: " what to do.
    """

    id: str
    reads: tuple[str, ...]
    check: Check

    @property
    def cause(self) -> str:
        """Return when the rule reports a problem."""
        return _words((self.check.__doc__ or "").partition("\n\n")[0])

    @property
    def fix(self) -> str:
        """Return what to do about it in general; each finding also has a specific fix."""
        text = _words((self.check.__doc__ or "").partition("Fix: ")[2])
        return text[:1].upper() + text[1:]

    def problems(self, context: Context) -> Iterable[Problem]:
        """Return the findings as problems; none if a key that the rule reads could not be used."""
        provenance = context.config.provenance
        if any(key in provenance.failed for key in self.reads):
            return
        for finding in self.check(context):
            yield Problem(
                id=self.id,
                key=finding.key,
                value=json_ready(value_of(context.config, finding.key)),
                reason=finding.reason,
                fix=finding.fix,
                severity=finding.severity,
                where=provenance.places.get(finding.key),
            )


def rule(identity: str, *reads: str) -> Callable[[Check], Rule]:
    """Turn a check function into the rule `identity`, which reads the keys `reads`."""
    return lambda check: Rule(id=identity, reads=reads, check=check)
