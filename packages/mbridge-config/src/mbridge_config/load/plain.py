"""A config as plain values, to be written into files."""

import dataclasses
from typing import Any


def plain(value: Any) -> Any:
    """The config (or a part of it) as YAML and JSON can hold it, without the record of where its keys were set."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {
            field.name: plain(getattr(value, field.name))
            for field in dataclasses.fields(value)
            if field.name != "origin"
        }
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value
