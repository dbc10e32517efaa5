"""The config that a run gets: interpolations resolved, other spellings moved, what was left null filled in."""

from typing import Any

from mbridge_config.problems import json_ready
from mbridge_config.run.kinds import RunConfig
from mbridge_config.schema.keys import Status, get, known_keys

_READ = (Status.HONOURED, Status.CHECKED)


def resolved(config: RunConfig, *, defaults: bool = True) -> dict[str, Any]:
    """The keys that a run reads, with plain JSON-ready values, in sections; without `defaults` those that differ."""
    tree: dict[str, Any] = {}
    schema: type = type(config)
    for path, info in known_keys(schema).items():
        value = json_ready(get(config, path))
        if info.spec.status in _READ and (defaults or value != json_ready(info.default)):
            *sections, name = path.split(".")
            section = tree
            for part in sections:
                section = section.setdefault(part, {})
            section[name] = value
    return tree


def resolved_text(config: RunConfig) -> str:
    """The keys that are not at their defaults, as YAML."""
    import yaml

    changed = resolved(config, defaults=False)
    text = yaml.safe_dump(changed, sort_keys=False, allow_unicode=True, width=1000) if changed else ""
    return "".join(f"  {line}\n" for line in text.splitlines())
