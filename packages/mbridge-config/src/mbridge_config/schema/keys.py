"""Declare a key: a dataclass field that also says what it means, which values it takes, and what becomes of it."""

import dataclasses
import enum
import functools
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeVar

Value = TypeVar("Value")


class Status(enum.Enum):
    """What mbridge does with a key."""

    HONOURED = "honoured"
    REFUSED = "refused"  # takes its default, or what means the same, and nothing else
    # The keys of the schema have one of the two above, those of `compat` one of these or REFUSED.
    CHECKED = "checked"  # must agree with the model's config.json, which stays the only source of the fact
    ALIAS = "alias"  # another spelling of a key
    NO_EFFECT = "no effect"


@dataclasses.dataclass(kw_only=True, slots=True, frozen=True)
class KeySpec:
    """What is declared about a key besides its type and default."""

    doc: str
    unit: str | None = None
    status: Status = Status.HONOURED
    why: str | None = None  # the reason, for a key without effect
    minimum: float | None = None
    maximum: float | None = None
    above: float | None = None
    below: float | None = None
    spellings: Mapping[str, str] = dataclasses.field(default_factory=dict)  # other spelling -> value
    refused: Mapping[str, str] = dataclasses.field(default_factory=dict)  # value -> why it is refused
    alias_of: str | None = None
    inverted: bool = False  # an alias that means the opposite


@dataclasses.dataclass(kw_only=True, slots=True, frozen=True)
class KeyInfo:
    """One row of the reference table."""

    path: str
    type: Any
    default: Any
    spec: KeySpec

    @property
    def type_name(self) -> str:
        """Return the type as the reference table spells it."""
        return describe_type(self.type)


def key(default: Any, doc: str, **spec: Any) -> Any:
    """Return a field with `default`; the keyword arguments are those of `KeySpec`."""
    metadata = {"spec": KeySpec(doc=doc, **spec)}
    if isinstance(default, list | dict):
        return dataclasses.field(default_factory=functools.partial(type(default), default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def section(kind: type, doc: str) -> Any:
    """Return a field that holds a section, a dataclass of keys."""
    return dataclasses.field(default_factory=kind, metadata={"spec": KeySpec(doc=doc)})


@functools.cache
def hints(kind: type) -> dict[str, Any]:
    """Return the type hints of a section by field name."""
    return typing.get_type_hints(kind)


def is_section(kind: Any) -> bool:
    """Return whether a type hint names a section."""
    return isinstance(kind, type) and dataclasses.is_dataclass(kind)


def declarations(kind: type, prefix: str = "") -> Iterator[KeyInfo]:
    """Iterate over all keys and sections under the section `kind`, in the order in which they are declared.

    A section comes before its keys, and its type is a dataclass.
    """
    for field in dataclasses.fields(kind):
        if (spec := field.metadata.get("spec")) is not None:
            path, hint = f"{prefix}{field.name}", hints(kind)[field.name]
            factory = field.default_factory
            default = field.default if factory is dataclasses.MISSING else factory()
            yield KeyInfo(path=path, type=hint, default=default, spec=spec)
            if is_section(hint):
                yield from declarations(hint, f"{path}.")


def schema_keys(kind: type) -> Iterator[KeyInfo]:
    """Iterate over all keys under the section `kind`."""
    return (info for info in declarations(kind) if not is_section(info.type))


@functools.cache
def known_sections(kind: type) -> dict[str, type]:
    """Return all sections under `kind` by their full name."""
    return {info.path: info.type for info in declarations(kind) if is_section(info.type)}


def nested(values: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """Return the tree of sections that has these values at their full keys."""
    tree: dict[str, Any] = {}
    for path, value in values:
        *sections, name = path.split(".")
        section = tree
        for part in sections:
            section = section.setdefault(part, {})
        section[name] = value
    return tree


def get(config: Any, path: str) -> Any:
    """Return the value at the full key `path`."""
    for name in path.split("."):
        config = getattr(config, name)
    return config


def put(config: Any, path: str, value: Any) -> None:
    """Set the value at the full key `path`."""
    *parents, name = path.split(".")
    setattr(get(config, ".".join(parents)) if parents else config, name, value)


def filled(value: Value | None) -> Value:
    """Return the value of a key whose null `compose` replaces, which therefore is not null.

    Raises `ValueError` for a config that was built by hand and left the key null.
    """
    if value is None:
        raise ValueError("a key is null that `compose` fills in; set it, or compose the config")
    return value


def union_parts(hint: Any) -> tuple[Any, ...]:
    """Return the types that a union joins, or the type itself."""
    is_union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    return typing.get_args(hint) if is_union else (hint,)


def describe_type(kind: Any) -> str:
    """Return the type as text: `integer | null`, `fp32 | bf16`, `list of text`."""
    origin, parts = typing.get_origin(kind), union_parts(kind)
    if len(parts) > 1:
        return " | ".join(map(describe_type, parts))
    if origin is typing.Literal:
        return " | ".join(str(choice) for choice in typing.get_args(kind))
    if origin is list:
        return f"list of {describe_type(typing.get_args(kind)[0])}"
    if origin is dict or kind is dict:
        return "section"
    names = {type(None): "null", bool: "true | false", int: "integer", float: "number", str: "text", Any: "anything"}
    return names.get(kind, getattr(kind, "__name__", str(kind)))
