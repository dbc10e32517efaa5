"""Arithmetic in YAML: `${subtract:${runner.seq_length},${data.max_prompt_length}}` and its like."""

import functools
import operator
from collections.abc import Callable
from typing import Any


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
    """Make the resolvers known to OmegaConf; names that are taken are left as they are."""
    from omegaconf import OmegaConf

    for name, resolver in RESOLVERS.items():
        if not OmegaConf.has_resolver(name):
            OmegaConf.register_new_resolver(name, resolver)
