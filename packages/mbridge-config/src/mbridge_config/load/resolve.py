"""Interpolations: `${runner.seq_length}`, `${oc.env:HOME}`, `${subtract:4,1}`; each is resolved by itself."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from mbridge_config.load.origin import Origin
from mbridge_config.load.resolvers import register
from mbridge_config.problems import Problem, json_ready

MISSING = "???"


def resolve(tree: dict[Any, Any], origin: Origin) -> dict[Any, Any]:
    """`tree` with its interpolations replaced by their values.

    A value that cannot be resolved, or is `???`, is reported in `origin.problems` and its key put in
    `origin.failed`; the value stays as it is. An interpolation of a failed key fails silently: one report is enough.
    Each value that itself names what cannot be found is reported.
    """
    open_values = [(path, value) for path, value in _leaves(tree, ()) if "${" in value or value == MISSING]
    if not open_values:
        return tree
    from omegaconf import OmegaConf
    from omegaconf.errors import InterpolationToMissingValueError, OmegaConfBaseException

    register()
    try:
        config = OmegaConf.create(tree)
    except OmegaConfBaseException as error:
        origin.problems.append(_problem(origin, None, None, f"the values cannot be read: {_first_line(error)}"))
        return tree
    told: set[str] = set()
    for path, raw in open_values:
        key = ".".join(str(part) for part in path if not isinstance(part, int))
        if raw == MISSING:
            origin.failed.add(key)
            origin.problems.append(
                Problem(
                    id="missing-value",
                    key=key,
                    value=raw,
                    reason="this config leaves it to you to set the key",
                    fix=f"add {key}=... to the command line, or write it in the file",
                    where=origin.where(key),
                )
            )
            continue
        try:
            parent: Any = config
            for part in path[:-1]:
                parent = parent[part]
            value = parent[path[-1]]
            value = OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
        except InterpolationToMissingValueError:
            origin.failed.add(key)
        except (RecursionError, OmegaConfBaseException, ValueError, TypeError, ArithmeticError, KeyError) as error:
            origin.failed.add(key)
            reason = f"the interpolation cannot be resolved: {_first_line(error)}"
            if isinstance(error, RecursionError) or "Recursive interpolation" in reason or "RecursionError" in reason:
                reason = "the interpolation leads back to itself"
            if reason not in told or _names(raw, reason):
                origin.problems.append(_problem(origin, key, raw, reason))
            told.add(reason)
        else:
            _put(tree, path, value)
    return tree


def _names(raw: str, reason: str) -> bool:
    """Whether what is not found stands in the value itself, and not in one that it refers to."""
    name = re.search(r"'([^']+)' not found", reason)
    return name is not None and name[1] in raw


def _leaves(value: Any, path: tuple[Any, ...]) -> Iterator[tuple[tuple[Any, ...], str]]:
    if isinstance(value, Mapping):
        for name, item in value.items():
            yield from _leaves(item, (*path, name))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _leaves(item, (*path, index))
    elif isinstance(value, str):
        yield path, value


def _put(tree: Any, path: tuple[Any, ...], value: Any) -> None:
    for part in path[:-1]:
        tree = tree[part]
    tree[path[-1]] = value


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _problem(origin: Origin, key: str | None, value: Any, reason: str) -> Problem:
    variable = re.search(r"Environment variable '(\w+)' not found", reason)
    fix = f"set the environment variable {variable[1]}" if variable else "correct what stands between ${ and }"
    if variable and key:
        fix += f", or add {key}=... to the command line"
    return Problem(
        id="interpolation", key=key, value=json_ready(value), reason=reason, fix=fix, where=origin.where(key)
    )
