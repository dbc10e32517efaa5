"""A JSON schema (draft 2020-12) of a kind of run, for editors that complete and check YAML.

`mbridge-config schema reasoning > reasoning.schema.json`

It knows what one value can be, not how values fit together: that is what `mbridge-config check` is for. Any value may
be an interpolation (`${…}`) or left open (`???`).
"""

import dataclasses
import json
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any

from mbridge_config.cli.arguments import Parser
from mbridge_config.compat.keys import compat_keys
from mbridge_config.schema.keys import KeyInfo, KeySpec, Status, default_of, hints, is_section, spec_of
from mbridge_config.schema.run_kinds import SCHEMAS

OPEN = r"\$\{.+\}|^\?\?\?$"
"""Text that stands for a value of any type."""
_TYPES = {bool: "boolean", int: "integer", float: "number", str: "string", dict: "object", type(None): "null"}


def run(words: Sequence[str]) -> int:
    """Print the schema of the kind of run `words[0]`; raises `ConfigError` for another word."""
    parser = Parser(prog="mbridge-config schema", description="A JSON schema, for editors that complete YAML.")
    parser.add_argument("kind", choices=list(SCHEMAS), help="kind of run")
    kind = parser.parse_args(list(words)).kind
    print(json.dumps(json_schema(kind), indent=2, ensure_ascii=False))
    return 0


def json_schema(kind: str) -> dict[str, Any]:
    """The schema of YAML files of the kind of run `kind`, with Hydra's own sections `defaults` and `hydra`."""
    schema: type = SCHEMAS[kind]
    found = _section(schema, f"A {kind} run of mbridge.", compat_keys(schema), "")
    hydra = {"defaults": {"type": "array", "description": "Hydra's defaults list."}, "hydra": {"type": "object"}}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": f"mbridge {kind} run",
        **found,
        "properties": hydra | found["properties"],
    }


def _section(kind: type, doc: str, compat: Mapping[str, KeyInfo], prefix: str) -> dict[str, Any]:
    properties = {}
    for field in dataclasses.fields(kind):
        spec, hint = spec_of(field), hints(kind)[field.name]
        if spec is not None and is_section(hint):
            properties[field.name] = _section(hint, spec.doc, compat, f"{prefix}{field.name}.")
        elif spec is not None:
            properties[field.name] = _key(hint, spec, default_of(field))
    for path, info in compat.items():
        name = path.removeprefix(prefix)
        if path.startswith(prefix) and "." not in name:
            properties[name] = _key(info.type, info.spec, info.default)
    # A keyword says nothing about values of other types: the pattern is that of a string, the properties of an object.
    return {
        "description": doc,
        "type": ["object", "string", "null"],
        "pattern": OPEN,
        "properties": properties,
        "additionalProperties": False,
    }


def _key(hint: Any, spec: KeySpec, default: Any) -> dict[str, Any]:
    found: dict[str, Any] = {"description": _description(spec)}
    if spec.status is Status.NO_EFFECT:
        found["deprecated"] = True
    if spec.alias_of is None and not (default is None or default == {}):
        found["default"] = default
    kinds = [_open(_value(part, spec)) for part in _parts(hint)]
    return found | (kinds[0] if len(kinds) == 1 else {"anyOf": kinds})


def _description(spec: KeySpec) -> str:
    text = f"No effect: {spec.why or 'not used'}." if spec.status is Status.NO_EFFECT else spec.doc
    return f"{text} [{spec.unit}]" if spec.unit else text


def _parts(hint: Any) -> tuple[Any, ...]:
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    return typing.get_args(hint) if union else (hint,)


def _value(hint: Any, spec: KeySpec) -> dict[str, Any]:
    origin = typing.get_origin(hint)
    if hint is Any:
        return {}
    if origin is typing.Literal:
        words = [*typing.get_args(hint), *spec.spellings]
        numbers = [int(word) for word in words if str(word).isdecimal()]  # YAML reads 32 as a number
        return {"enum": [*words, *numbers]}
    if origin is list:
        item = _value(typing.get_args(hint)[0], spec)
        several = {"type": "array", "items": _open(item)}
        if "enum" in item:
            return {"anyOf": [several, item]}
        return (
            {"type": ["array", "string"], "items": _open(item)} if "string" in item.get("type", ["string"]) else several
        )
    if hint is str:
        return {"type": ["string", "number"]}
    found: dict[str, Any] = {"type": _TYPES[origin or hint]}
    if hint in (int, float):
        limits = {
            "minimum": spec.minimum,
            "exclusiveMinimum": spec.above,
            "maximum": spec.maximum,
            "exclusiveMaximum": spec.below,
        }
        found |= {name: limit for name, limit in limits.items() if limit is not None}
    return found


def _open(value: dict[str, Any]) -> dict[str, Any]:
    """`value`, or text that stands for it."""
    if not value or "string" in value.get("type", ()):
        return value
    return {"anyOf": [value, {"type": "string", "pattern": OPEN}]}
