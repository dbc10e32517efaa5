"""Parse and check JSON text that is not trusted."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, fields
from math import isfinite
from typing import Any

from mbridge_ckpt.errors import CheckpointError, CorruptCheckpointError


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


def wrong_keys(value: dict[str, Any], types: Mapping[str, type], required: Iterable[str]) -> list[str]:
    """List the keys of `value` that are unknown, missing or of another type than `types` says, in sorted order."""
    return sorted(
        {key for key, item in value.items() if type(item) is not types.get(key)} | (set(required) - value.keys())
    )


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
