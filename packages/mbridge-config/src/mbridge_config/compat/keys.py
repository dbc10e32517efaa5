"""All keys of a kind of run: those of the schema, and those of the table of RLinf's keys."""

import functools
from collections.abc import Iterator
from typing import Any

from mbridge_config.compat import rlinf
from mbridge_config.schema.keys import KeyInfo, KeySpec, Status, get, put, schema_keys
from mbridge_config.schema.reasoning import ReasoningConfig
from mbridge_config.schema.sft import SFTConfig


@functools.cache
def compat_keys(kind: type) -> dict[str, KeyInfo]:
    """Return the keys of the table that runs of `kind` accept, by their full name."""
    no_effect, aliases, refused = [rlinf.NO_EFFECT], dict(rlinf.ALIASES), dict(rlinf.REFUSED)
    if issubclass(kind, ReasoningConfig):
        no_effect.append(rlinf.NO_EFFECT_IN_REASONING)
        aliases |= rlinf.ALIASES_IN_REASONING
        refused |= rlinf.REFUSED_IN_REASONING
    elif issubclass(kind, SFTConfig):
        no_effect.append(rlinf.NO_EFFECT_IN_SFT)
        aliases |= rlinf.ALIASES_IN_SFT
    else:
        return {}
    infos = [info for sections in no_effect for info in _without_effect(sections)]
    for path, alias in aliases.items():
        doc = f"The opposite of `{alias.of}`." if alias.inverted else f"Another name of `{alias.of}`."
        spec = KeySpec(doc=doc, status=Status.ALIAS, alias_of=alias.of, inverted=alias.inverted)
        infos.append(KeyInfo(path=path, type=alias.type | None, default=None, spec=spec))
    for name, row in rlinf.CHECKED.items():
        spec = KeySpec(doc=row.doc, status=Status.CHECKED)
        infos.append(KeyInfo(path=f"actor.model.{name}", type=row.type | None, default=None, spec=spec))
    for path, (doc, why) in refused.items():
        spec = KeySpec(doc=doc, status=Status.REFUSED, refused={"True": why})
        infos.append(KeyInfo(path=path, type=bool, default=False, spec=spec))
    return {info.path: info for info in infos}


def _without_effect(sections: rlinf.NoEffect) -> Iterator[KeyInfo]:
    for section, reasons in sections.items():
        for why, types in reasons.items():
            for hint, names in types.items():
                for name in names.split():
                    path = f"{section}.{name}" if section else name
                    spec = KeySpec(doc="Read by other trainers.", status=Status.NO_EFFECT, why=why)
                    yield KeyInfo(path=path, type=hint | None, default=None, spec=spec)


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
