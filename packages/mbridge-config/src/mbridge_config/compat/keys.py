"""All keys of a kind of run: those of the schema, and those of `rlinf.toml`, the table of RLinf's keys."""

import dataclasses
import functools
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from mbridge_config.schema.keys import KeyInfo, KeySpec, Status, get, put, schema_keys
from mbridge_config.schema.run_kinds import SCHEMAS

_TABLE = tomllib.loads(Path(__file__).with_name("rlinf.toml").read_text(encoding="utf-8"))
_TYPES: dict[str, Any] = {
    "bool": bool,
    "int": int,
    "float": float,
    "str": str,
    "dict": dict[str, Any],
    "list": list[Any],
    "list[str]": list[str],
    "str | bool": str | bool,
    "int | list[int]": int | list[int],
    "[left, right]": Literal["left", "right"],
    "[nccl, gloo]": Literal["nccl", "gloo"],
}


@dataclasses.dataclass(kw_only=True, slots=True, frozen=True)
class Repeated:
    """A fact of the model that config.json holds in `field`, and `HFFacts` as `fact`; None for the name of a kind."""

    type: str
    doc: str
    fact: str | None = None
    field: str | None = None


CHECKED = {name: Repeated(**row) for name, row in _TABLE["checked"].items()}
"""Keys of `actor.model` that repeat a fact of config.json, which is the only source of it."""


@functools.cache
def compat_keys(kind: type) -> dict[str, KeyInfo]:
    """Return the keys of the table that runs of `kind` accept, by their full name."""
    runs = next((name for name, schema in SCHEMAS.items() if issubclass(kind, schema)), None)
    return {info.path: info for info in _declared(("all", runs))} if runs else {}


def _declared(kinds: tuple[str, ...]) -> Iterator[KeyInfo]:
    for section, reasons in _rows("no_effect", kinds):
        for why, types in reasons.items():
            spec = KeySpec(doc="Read by other trainers.", status=Status.NO_EFFECT, why=why)
            for hint, names in types.items():
                for name in names:
                    yield _nullable(f"{section}.{name}".lstrip("."), hint, spec)
    for path, row in _rows("alias", kinds):
        inverted = row.get("inverted", False)
        doc = f"The opposite of `{row['of']}`." if inverted else f"Another name of `{row['of']}`."
        yield _nullable(path, row["type"], KeySpec(doc=doc, status=Status.ALIAS, alias_of=row["of"], inverted=inverted))
    for name, fact in CHECKED.items():
        yield _nullable(f"actor.model.{name}", fact.type, KeySpec(doc=fact.doc, status=Status.CHECKED))
    for path, row in _rows("refused", kinds):
        spec = KeySpec(doc=row["doc"], status=Status.REFUSED, refused={"True": row["why"]})
        yield KeyInfo(path=path, type=bool, default=False, spec=spec)


def _rows(table: str, kinds: tuple[str, ...]) -> Iterator[tuple[str, dict[str, Any]]]:
    for kind in kinds:
        yield from _TABLE[table].get(kind, {}).items()


def _nullable(path: str, hint: str, spec: KeySpec) -> KeyInfo:
    return KeyInfo(path=path, type=_TYPES[hint] | None, default=None, spec=spec)


@functools.cache
def known_keys(kind: type) -> dict[str, KeyInfo]:
    """Return all keys that runs of `kind` accept, by their full name; the schema's come first."""
    return {info.path: info for info in schema_keys(kind)} | compat_keys(kind)


def key_table(kind: type) -> Iterator[KeyInfo]:
    """Iterate over all keys that runs of `kind` accept, or that the section `kind` of the schema has."""
    yield from known_keys(kind).values()


def value_of(config: Any, path: str) -> Any:
    """Return the value of the key `path`, of the schema or of the table; None for one of the table that is not set."""
    kind: type = type(config)
    return config.provenance.compat.get(path) if path in compat_keys(kind) else get(config, path)


def set_value(config: Any, path: str, value: Any) -> None:
    """Set the key `path`, of the schema or of the table."""
    kind: type = type(config)
    if path in compat_keys(kind):
        config.provenance.compat[path] = value
    else:
        put(config, path, value)
