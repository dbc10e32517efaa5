"""Resolve interpolations one by one: `${runner.seq_length}`, `${oc.env:HOME}`, `${subtract:4,1}`."""

import functools
import operator
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from mbridge_config.schema.provenance import Provenance

MISSING = "???"


def resolve_interpolations(tree: dict[Any, Any], provenance: Provenance) -> dict[Any, Any]:
    """Return `tree` with its interpolations replaced by their values.

    A value that cannot be resolved, or is `???`, stays as it is; it is reported in `provenance.problems`, and its key
    is added to `provenance.failed`. A reference to a failed key fails silently, since one report is enough, but every
    value that names something unknown is reported itself.
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
        _report(provenance, None, None, f"the values cannot be read: {_first_line(error)}")
        return tree
    told: set[str] = set()
    for path, raw in open_values:
        key = ".".join(str(part) for part in path if not isinstance(part, int))
        if raw == MISSING:
            provenance.failed.add(key)
            fix = f"add {key}=... to the command line, or write it in the file"
            provenance.report("missing-value", key, raw, "this config leaves it to you to set the key", fix)
            continue
        try:
            value: Any = functools.reduce(operator.getitem, path, config)
            value = OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
        except InterpolationToMissingValueError:
            provenance.failed.add(key)
        except (RecursionError, OmegaConfBaseException, ValueError, TypeError, ArithmeticError, KeyError) as error:
            provenance.failed.add(key)
            reason = f"the interpolation cannot be resolved: {_first_line(error)}"
            if isinstance(error, RecursionError) or "Recursive interpolation" in reason or "RecursionError" in reason:
                reason = "the interpolation leads back to itself"
            if reason not in told or _names(raw, reason):
                _report(provenance, key, raw, reason)
            told.add(reason)
        else:
            functools.reduce(operator.getitem, path[:-1], tree)[path[-1]] = value
    return tree


def _names(raw: str, reason: str) -> bool:
    """Return whether the unknown name occurs in the value itself, not in one that it refers to."""
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


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _report(provenance: Provenance, key: str | None, value: Any, reason: str) -> None:
    variable = re.search(r"Environment variable '(\w+)' not found", reason)
    fix = f"set the environment variable {variable[1]}" if variable else "correct what stands between ${ and }"
    if variable and key:
        fix += f", or add {key}=... to the command line"
    provenance.report("interpolation", key, value, reason, fix)


def _number(value: Any, name: str) -> int | float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{name} takes numbers, not {value!r}")
    return value


def _fold(name: str, combine: Callable[[Any, Any], Any]) -> Callable[..., int | float]:
    def resolver(first: Any, second: Any, *others: Any) -> int | float:
        return functools.reduce(combine, [_number(value, name) for value in (first, second, *others)])

    return resolver


def _divide(a: int | float, b: int | float) -> int | float:
    # a count divided by a count stays a count where it divides evenly
    return a // b if isinstance(a, int) and isinstance(b, int) and a % b == 0 else a / b


def _negate(value: Any) -> bool:
    if isinstance(value, str):
        raise ValueError(f"not takes true or false, not {value!r}")
    return not value


RESOLVERS: dict[str, Callable[..., Any]] = {
    "add": _fold("add", operator.add),
    "subtract": _fold("subtract", operator.sub),
    "multiply": _fold("multiply", operator.mul),
    "divide": _fold("divide", _divide),
    "int_div": _fold("int_div", operator.floordiv),
    "min": _fold("min", min),
    "max": _fold("max", max),
    "not": _negate,
    "torch.dtype": str,  # keys of number formats take the names of torch's dtypes
}


def register() -> None:
    """Register the resolvers with OmegaConf, except under names that are taken."""
    from omegaconf import OmegaConf

    for name, resolver in RESOLVERS.items():
        if not OmegaConf.has_resolver(name):
            OmegaConf.register_new_resolver(name, resolver)
