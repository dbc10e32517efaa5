"""A JSON schema (draft 2020-12) of a kind of run, for editors that complete and check YAML.

`mbridge-config schema reasoning > reasoning.schema.json`

It knows what one value can be, not how values fit together: that is what `mbridge-config check` is for. Any value may
be an interpolation (`${…}`) or left open (`???`).
"""

import json
import typing
from collections.abc import Sequence
from typing import Any

from mbridge_config.cli.arguments import Parser
from mbridge_config.compat.keys import compat_keys
from mbridge_config.schema.keys import KeyInfo, KeySpec, Status, declarations, is_section, union_parts
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
    sections = {"": _section(f"A {kind} run of mbridge.")}
    for info in (*declarations(schema), *compat_keys(schema).values()):
        parent, _, name = info.path.rpartition(".")
        if is_section(info.type):
            found = sections[info.path] = _section(info.spec.doc)
        else:
            found = _key(info)
        sections[parent]["properties"][name] = found
    hydra = {"defaults": {"type": "array", "description": "Hydra's defaults list."}, "hydra": {"type": "object"}}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": f"mbridge {kind} run",
        **sections[""],
        "properties": hydra | sections[""]["properties"],
    }


def _section(doc: str) -> dict[str, Any]:
    # A keyword says nothing about values of other types: the pattern is that of a string, the properties of an object.
    return {
        "description": doc,
        "type": ["object", "string", "null"],
        "pattern": OPEN,
        "properties": {},
        "additionalProperties": False,
    }


def _key(info: KeyInfo) -> dict[str, Any]:
    spec, default = info.spec, info.default
    found: dict[str, Any] = {"description": _description(spec)}
    if spec.status is Status.NO_EFFECT:
        found["deprecated"] = True
    if spec.alias_of is None and not (default is None or default == {}):
        found["default"] = default
    kinds = [_open(_value(part, spec)) for part in union_parts(info.type)]
    return found | (kinds[0] if len(kinds) == 1 else {"anyOf": kinds})


def _description(spec: KeySpec) -> str:
    text = f"No effect: {spec.why or 'not used'}." if spec.status is Status.NO_EFFECT else spec.doc
    return f"{text} [{spec.unit}]" if spec.unit else text


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
        is_text = "string" in item.get("type", ["string"])
        return several | {"type": ["array", "string"]} if is_text else several
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
