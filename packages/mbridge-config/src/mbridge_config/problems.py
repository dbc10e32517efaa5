"""Describe what is wrong with a config: one `Problem` per finding, one `ConfigError` for all of them."""

import dataclasses
import enum
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar


class Severity(enum.IntEnum):
    """How serious a problem is; lower sorts first."""

    ERROR = 0
    WARNING = 1
    NOTE = 2


@dataclasses.dataclass(kw_only=True, slots=True, frozen=True)
class Where:
    """The place where a key was set: a line of a YAML file, or an argument of the command line."""

    file: str | None = None
    line: int | None = None
    argument: str | None = None

    def __str__(self) -> str:
        if self.argument is not None:
            return f"command line: {self.argument}"
        return f"{self.file}:{self.line}" if self.line is not None else str(self.file)


@dataclasses.dataclass(kw_only=True, slots=True, frozen=True)
class Problem:
    """One finding.

    `id` is stable and documented; `key` is the full dotted key, or None where no single key is to blame;
    `reason` says what is wrong and `fix` what to do about it.
    """

    id: str
    reason: str
    fix: str
    key: str | None = None
    value: Any = None
    severity: Severity = Severity.ERROR
    where: Where | None = None

    def __str__(self) -> str:
        subject = "" if self.key is None else f"{self.key} = {short(self.value)}: "
        place = "" if self.where is None else f"\n    at:  {self.where}"
        return f"{self.severity.name.lower()}[{self.id}] {subject}{self.reason}{place}\n    fix: {self.fix}"

    def as_dict(self) -> dict[str, Any]:
        """Return the same as plain JSON-ready values."""
        return {
            "id": self.id,
            "severity": self.severity.name.lower(),
            "key": self.key,
            "value": json_ready(self.value),
            "reason": self.reason,
            "fix": self.fix,
            "where": None if self.where is None else str(self.where),
        }


def short(value: Any, limit: int = 100) -> str:
    """Return `value` as YAML would spell it, cut to `limit` characters."""
    spelled = {None: "null", True: "true", False: "false"}.get(value) if isinstance(value, bool | None) else None
    text = spelled if spelled is not None else (value if isinstance(value, str) and value else repr(value))
    return text if len(text) <= limit else text[: limit - 3] + "..."


def shown(path: Path) -> str:
    """Return `path` as messages show it: relative to the working directory if it lies below it."""
    relative = os.path.relpath(path)
    return str(path) if relative.startswith("..") else relative


def json_ready(value: Any) -> Any:
    """Return `value` with everything turned into text that JSON has no type for."""
    if isinstance(value, dict):
        return {str(name): json_ready(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [json_ready(item) for item in value]
    return value if isinstance(value, bool | int | float | str | None) else str(value)


def ordered(problems: Iterable[Problem]) -> list[Problem]:
    """Sort errors first, then warnings, then notes; keep the order in which they were found within a severity."""
    return sorted(problems, key=lambda problem: problem.severity)


def render(problems: Sequence[Problem]) -> str:
    """Return all problems as text, errors first; notes with the same reason share a line."""
    lines: list[str] = []
    notes: dict[tuple[str, str], list[str]] = {}
    for problem in ordered(problems):
        if problem.severity is Severity.NOTE:
            notes.setdefault((problem.id, problem.reason), []).append(problem.key or "")
        else:
            lines.append(str(problem))
    lines += [f"note[{identity}] {', '.join(keys)}: {reason}" for (identity, reason), keys in notes.items()]
    return "\n".join(lines)


class ConfigError(Exception):
    """A config that cannot run. `problems` holds all findings; `str()` prints them all."""

    exit_code: ClassVar[int] = 2

    def __init__(self, problems: Sequence[Problem] | Problem):
        self.problems: list[Problem] = ordered([problems] if isinstance(problems, Problem) else problems)
        super().__init__(self.problems)

    def __str__(self) -> str:
        count = sum(problem.severity is Severity.ERROR for problem in self.problems)
        return f"{render(self.problems)}\n{count} error{'' if count == 1 else 's'} in the config"


def refusal(
    identity: str, reason: str, fix: str, *, key: str | None = None, value: Any = None, where: Where | None = None
) -> ConfigError:
    """Return a `ConfigError` with one problem."""
    return ConfigError(Problem(id=identity, reason=reason, fix=fix, key=key, value=value, where=where))
