"""Return a config as plain values, to be printed or written into files."""

import dataclasses
from typing import Any

from mbridge_config.compat.keys import known_keys, value_of
from mbridge_config.problems import json_ready
from mbridge_config.schema.keys import Status, nested
from mbridge_config.schema.run_kinds import RunConfig


def plain(value: Any) -> Any:
    """Return a config or a part of it as YAML and JSON can hold it, without the record of where its keys were set."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = (field.name for field in dataclasses.fields(value) if field.name != "provenance")
        return {name: plain(getattr(value, name)) for name in names}
    return json_ready(value)


_IN_USE = (Status.HONOURED, Status.REFUSED, Status.CHECKED)


def values_in_use(config: RunConfig, *, defaults: bool = True) -> dict[str, Any]:
    """Return the keys that a run uses, with JSON-ready values; without `defaults`, only those that differ from them."""
    schema: type = type(config)
    values = ((info, json_ready(value_of(config, info.path))) for info in known_keys(schema).values())
    return nested(
        (info.path, value)
        for info, value in values
        if info.spec.status in _IN_USE and (defaults or value != json_ready(info.default))
    )


def values_in_use_text(config: RunConfig) -> str:
    """Return the keys that differ from their defaults, as YAML."""
    import yaml

    changed = values_in_use(config, defaults=False)
    text = yaml.safe_dump(changed, sort_keys=False, allow_unicode=True, width=1000) if changed else ""
    return "".join(f"  {line}\n" for line in text.splitlines())
