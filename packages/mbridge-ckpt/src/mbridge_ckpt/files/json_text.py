"""Parse and check JSON text that is not trusted."""

import json
from dataclasses import MISSING, asdict, fields
from math import isfinite
from typing import Any, get_args

from mbridge_ckpt.errors import CheckpointError, CorruptCheckpointError, LayoutError


def parse_json(data: bytes) -> Any:
    """Parse JSON text; raise CorruptCheckpointError also for a key that occurs twice and for numbers like NaN."""
    try:
        return json.loads(data, object_pairs_hook=_without_duplicates, parse_constant=_finite, parse_float=_finite)
    except (ValueError, RecursionError) as error:
        raise CorruptCheckpointError(f"not JSON: {error}") from None


def parse_document(data: bytes, name: str, version: int) -> dict[str, Any]:
    """Parse an object of the format `name`; raise CheckpointError if it has another version than `version`."""
    value = parse_json(data)
    if not isinstance(value, dict) or value.get("format") != name:
        raise CorruptCheckpointError(f'no "format": "{name}" in it')
    if value.get("format_version") != version:
        raise CheckpointError(
            f"format version {value.get('format_version')!r}, this program reads version {version}; install a later"
            " mbridge-ckpt"
        )
    return value


def parse_fields[T](kind: type[T], value: Any, what: str) -> T:
    """Make a flat dataclass of a JSON object, whose values must have the types of the fields.

    Raises CorruptCheckpointError for a key that is unknown, missing or of the wrong type, or what the class refuses.
    """
    if not isinstance(value, dict):
        raise CorruptCheckpointError(f"{what}: expected objects, found {type(value).__name__}")
    known = {field.name: field for field in fields(kind)}  # type: ignore[arg-type]  # a dataclass
    wrong = {key for key, item in value.items() if key not in known or type(item) is not _json_type(known[key].type)}
    wrong |= {name for name, field in known.items() if field.default is MISSING and name not in value}
    if wrong:
        name = f" {value['name']!r}" if "name" in value else ""
        raise CorruptCheckpointError(f"{what}{name}: bad, missing or unknown keys {sorted(wrong)}")
    try:
        return kind(**value)
    except LayoutError as error:
        raise CorruptCheckpointError(str(error)) from None


def _json_type(annotation: Any) -> type:
    """Return the type that stands in JSON text for `str`, `int | None` or `Literal["a", "b"]`."""
    first = next(iter(get_args(annotation)), annotation)
    return first if isinstance(first, type) else type(first)


def without_defaults(instance: Any) -> dict[str, Any]:
    """Return the fields of a dataclass that differ from their defaults: there may be tens of thousands in a file."""
    defaults = {field.name: field.default for field in fields(instance)}
    return {key: value for key, value in asdict(instance).items() if value != defaults[key]}


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        raise ValueError("an object has the same key twice")
    return value


def _finite(text: str) -> float:
    value = float(text)
    if not isfinite(value):  # NaN, Infinity, 1e999
        raise ValueError(f"{text} is no finite number")
    return value
