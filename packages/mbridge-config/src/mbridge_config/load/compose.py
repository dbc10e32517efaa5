"""Compose Hydra YAML and `key=value` arguments into a typed config.

    config = compose("qwen2.5-1.5b-grpo-megatron", package_config="mbridge_reasoning")

Hydra makes one tree of the file, its defaults list and the arguments. The schema's defaults are laid under it,
so that interpolations may refer to keys that no file sets. Then each interpolation is resolved by itself and the
tree is converted, so that all mistakes are found at once.
"""

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, overload

from mbridge_config.compat.keys import known_keys
from mbridge_config.load.catalog import locate
from mbridge_config.load.defaults import fill_defaults
from mbridge_config.load.interpolations import resolve_interpolations
from mbridge_config.load.validate import convert
from mbridge_config.problems import ConfigError, Severity
from mbridge_config.schema.keys import nested
from mbridge_config.schema.provenance import Provenance
from mbridge_config.schema.run_kinds import RunConfig, schema_of

Schema = TypeVar("Schema")


@overload
def compose(
    config_name: str,
    config_path: str | Path | None = None,
    overrides: Sequence[str] = (),
    *,
    package_config: str | None = None,
    schema: type[Schema],
    strict: bool = True,
) -> Schema: ...


@overload
def compose(
    config_name: str,
    config_path: str | Path | None = None,
    overrides: Sequence[str] = (),
    *,
    package_config: str | None = None,
    schema: None = None,
    strict: bool = True,
) -> RunConfig: ...


def compose(
    config_name: str,
    config_path: str | Path | None = None,
    overrides: Sequence[str] = (),
    *,
    package_config: str | None = None,
    schema: type[Any] | None = None,
    strict: bool = True,
) -> Any:
    """Return the config `config_name` with `overrides` (`key=value`, `+key=value`, `++key=value`, `~key`).

    The name is looked up in `config_path`; without one, in the configs of the app with the import name
    `package_config`; without both, in those of all installed apps (`sft/quickstart` is that of the app sft). `schema`
    is `ReasoningConfig` or `SFTConfig`; without it `runner.task_type` decides. Raises `ConfigError` with everything
    that is wrong in names, syntax, keys and types; with `strict=False` mistakes in keys and types are left in
    `config.provenance.problems`, for `check` to report them together with its own.
    """
    from mbridge_config.load.hydra_tree import hydra_tree  # YAML and Hydra take most of a second to import

    file, directory = locate(config_name, config_path, package_config)
    tree, places = hydra_tree(file, directory, overrides)
    provenance = Provenance(places=places)
    return from_tree(tree, provenance, schema or schema_of(tree), strict=strict)


def from_tree(tree: Mapping[Any, Any], provenance: Provenance, schema: type[Schema], *, strict: bool = True) -> Schema:
    """Return a config of the kind `schema` from a tree with unresolved interpolations. Raises as `compose` does."""
    kind: type = schema
    defaults = nested((path, copy.copy(info.default)) for path, info in known_keys(kind).items())
    complete = resolve_interpolations(laid_over(tree, defaults), provenance)
    config = convert(schema, complete, provenance)
    config.provenance = provenance
    fill_defaults(config)
    if strict and any(problem.severity is Severity.ERROR for problem in provenance.problems):
        raise ConfigError(provenance.problems)
    return config


def laid_over(tree: Mapping[Any, Any], under: Mapping[Any, Any]) -> dict[Any, Any]:
    """Return `tree` with what it lacks taken from `under`; sections are merged, everything else is replaced."""
    merged = dict(under)
    for name, value in tree.items():
        below = under.get(name)
        merged[name] = laid_over(value, below) if isinstance(value, Mapping) and isinstance(below, Mapping) else value
    return merged
