"""The reference pages, made from the schema and the rules: all keys, and all problems."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from mbridge_config.compat.keys import compat_keys
from mbridge_config.rules.explanations import explanations
from mbridge_config.schema.keys import KeyInfo, KeySpec, Status, hints, is_section, schema_keys, spec_of
from mbridge_config.schema.kinds import SCHEMAS

CONFIGURATION = """\
# Configuration

All keys of all kinds of runs, generated from the schema by `nox -s reference`. The names are those of RLinf's Megatron
configs. A value may be an interpolation, `${runner.seq_length}`. `mbridge-config check NAME` tells whether the values
fit together; [errors.md](errors.md) lists everything it may say.

*Runs*: the kinds of runs that have the key in this form; all, if none is named. *Status*:

- **honoured**: the key does what it says.
- **refused**: only the default, or a value that means the same, is accepted. Any other value is an error that says why.

Keys of RLinf's configs that set nothing here are accepted as well; [the last section](#compatibility) lists them.

"""

COMPATIBILITY = """
## Compatibility

Keys that RLinf's YAML files bring and that set nothing here, so that such a file can be used as it is. *Status*:

- **checked**: the key repeats a fact of the model's `config.json`, which is the only source of the fact. A wrong value
  is an error; the key can always be left out.
- **alias**: another spelling of a key, which gets the value.
- **no effect**: accepted and ignored. One line of the report says why it changes nothing.
- **refused**: as above; what the key would switch on does not exist here.

"""

ERRORS = """\
# Problems

Everything that `mbridge-config check` and the apps may say about a config, made by `nox -s reference`. The id of a
problem stands in brackets: `error[unknown-key]`. `mbridge-config explain ID` prints one of these. Errors keep a run
from starting, warnings and notes do not.

"""


def configuration_page() -> str:
    """docs/configuration.md: a table of keys for each section of the schemas."""
    sections: dict[str, list[tuple[KeyInfo, str]]] = {}
    for info, runs in _keys(schema_keys):
        sections.setdefault(info.path.rpartition(".")[0], []).append((info, runs))
    docs = _section_docs()
    parts = []
    for name, rows in sections.items():
        title, text = (f"`{name}`", docs[name]) if name else ("Sections without keys of their own", "")
        lines = [f"## {title}", "", *([text, ""] if text else [])]
        lines += ["| key | type | default | unit | status | runs | meaning |", "|---|---|---|---|---|---|---|"]
        parts.append("\n".join([*lines, *(_row(info, runs) for info, runs in rows)]))
    lines = ["| key | type | status | runs | meaning |", "|---|---|---|---|---|"]
    for info, runs in _keys(lambda schema: compat_keys(schema).values()):
        lines.append(_table_row(f"`{info.path}`", info.type_name, info.spec.status.value, runs, _meaning(info.spec)))
    return CONFIGURATION + "\n\n".join(parts) + "\n" + COMPATIBILITY + "\n".join(lines) + "\n"


def errors_page() -> str:
    """docs/errors.md: cause and fix of each problem id."""
    parts = []
    for identity, meanings in explanations().items():
        lines = [f"## {identity}"]
        for meaning in meanings:
            label = f"In {'SFT' if meaning.runs == 'sft' else meaning.runs} runs: " if meaning.runs else ""
            lines += ["", f"{label}{meaning.cause}", "", f"**Fix:** {meaning.fix}"]
        parts.append("\n".join(lines))
    return ERRORS + "\n\n".join(parts) + "\n"


def _keys(keys_of: Callable[[type], Iterable[KeyInfo]]) -> Iterator[tuple[KeyInfo, str]]:
    """Iterate over the keys of all schemas, each with the kinds of runs that have it in this form; empty: all kinds."""
    tables = {kind: {info.path: info for info in keys_of(schema)} for kind, schema in SCHEMAS.items()}
    for path in dict.fromkeys(path for table in tables.values() for path in table):
        told: list[KeyInfo] = []
        for table in tables.values():
            info = table.get(path)
            if info is None or info in told:
                continue
            told.append(info)
            holders = [kind for kind, other in tables.items() if other.get(path) == info]
            yield info, "" if len(holders) == len(tables) else ", ".join(holders)


def _section_docs() -> dict[str, str]:
    """What the schemas say about each section: the part of its class's docstring behind the name."""
    found: dict[str, str] = {}

    def walk(kind: type, prefix: str) -> None:
        for field in dataclasses.fields(kind):
            hint = hints(kind)[field.name]
            if spec_of(field) is not None and is_section(hint):
                found.setdefault(f"{prefix}{field.name}", _sentence(hint.__doc__ or ""))
                walk(hint, f"{prefix}{field.name}.")

    for schema in SCHEMAS.values():
        walk(schema, "")
    return found


def _sentence(doc: str) -> str:
    text = " ".join(doc.split()).partition(": ")[2]
    return text[:1].upper() + text[1:]


def _row(info: KeyInfo, runs: str) -> str:
    spec = info.spec
    return _table_row(
        f"`{info.path.rpartition('.')[2]}`",
        _type(info),
        f"`{yaml_text(info.default)}`",
        spec.unit or "",
        spec.status.value,
        runs,
        _meaning(spec),
    )


def _table_row(*cells: str) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _type(info: KeyInfo) -> str:
    spec = info.spec
    limits = (("≥", spec.minimum), (">", spec.above), ("≤", spec.maximum), ("<", spec.below))
    bounds = [f"{sign} {limit:g}" for sign, limit in limits if limit is not None]
    return ", ".join([info.type_name, *bounds])


def _meaning(spec: KeySpec) -> str:
    if spec.status is Status.NO_EFFECT:
        why = spec.why or "not used"
        return f"{why[:1].upper()}{why[1:]}."
    parts = [spec.doc]
    if spec.spellings:
        parts.append(f"Also: {_listing(f'{other} ({value})' for other, value in spec.spellings.items())}.")
    by_reason: dict[str, list[str]] = {}
    for value, reason in spec.refused.items():
        by_reason.setdefault(reason, []).append(value.lower())
    parts += [f"Refused: {_listing(values)} ({reason})." for reason, values in by_reason.items()]
    return " ".join(parts)


def _listing(items: Iterable[str]) -> str:
    return ", ".join(items)


def yaml_text(value: Any) -> str:
    """A default as a YAML file spells it."""
    if isinstance(value, list):
        return f"[{', '.join(map(yaml_text, value))}]"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, bool):
        return str(value).lower()
    return "null" if value is None else str(value)


PAGES: dict[str, Callable[[], str]] = {"configuration.md": configuration_page, "errors.md": errors_page}
"""The pages by their names in docs/."""
