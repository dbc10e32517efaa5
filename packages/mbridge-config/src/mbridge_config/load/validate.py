"""Convert the plain values of a YAML tree to the typed sections of the schema, and find every mistake in them."""

import copy
import difflib
import math
import typing
from collections.abc import Mapping
from typing import Any

from mbridge_config.compat.keys import known_keys
from mbridge_config.problems import Severity
from mbridge_config.schema.keys import KeyInfo, KeySpec, Status, describe_type, hints, known_sections, union_parts
from mbridge_config.schema.provenance import Provenance


class Unfit(Exception):
    """A value that does not fit its key, with reason and fix."""

    def __init__(self, reason: str, fix: str, identity: str = "wrong-type"):
        super().__init__(reason)
        self.reason, self.fix, self.identity = reason, fix, identity


_LARGEST = 2**63 - 1  # what torch and files hold


def convert(kind: type, tree: Mapping[Any, Any], provenance: Provenance) -> Any:
    """Return an instance of the section `kind` with the values of `tree`.

    A key that is missing, or whose value does not fit, gets its default. What was wrong is added to
    `provenance.problems`, and the key to `provenance.failed`.
    """
    return _Converter(kind, provenance).section(kind, tree, "")


class _Converter:
    def __init__(self, root: type, provenance: Provenance):
        self.root, self.keys, self.sections = root, known_keys(root), known_sections(root)
        self.provenance = provenance

    def section(self, kind: type, tree: Any, prefix: str) -> Any:
        if not isinstance(tree, Mapping):
            name = prefix.rstrip(".")
            if tree is not None:
                reason, fix = "a section of keys is expected", f"write keys under {name}"
                self.provenance.report("wrong-type", name, tree, reason, fix)
                self.provenance.failed.update(path for path in self.keys if path.startswith(prefix))
            return kind()
        fields, values = hints(kind), dict[str, Any]()
        for name, raw in tree.items():
            path = f"{prefix}{name}"
            if name in fields and path in self.sections:
                values[name] = self.section(fields[name], raw, f"{path}.")
            elif (info := self.keys.get(path)) is None:
                self.unknown(path, raw)
            elif path not in self.provenance.failed:
                value = self.leaf(info, raw)
                if name in fields:
                    values[name] = value
                else:
                    self.provenance.compat[path] = value
        return kind(**values)

    def leaf(self, info: KeyInfo, raw: Any) -> Any:
        path, hint, spec = info.path, info.type, info.spec
        try:
            if (refusal := spec.refused.get(str(raw))) is not None:
                raise Unfit(refusal, f"use {_allowed(hint, spec, raw)}", "refused-value")
            value = fit(raw, hint, spec)
            check_range(value, spec)
        except Unfit as unfit:
            self.provenance.failed.add(path)
            self.provenance.report(unfit.identity, path, raw, unfit.reason, unfit.fix)
            return copy.copy(info.default)
        if spec.status is Status.NO_EFFECT and self.provenance.was_set(path) and value not in (None, {}):
            self.provenance.report("no-effect", path, value, spec.why or "not used", "remove the key", Severity.NOTE)
        return value

    def unknown(self, path: str, raw: Any) -> None:
        nearest = nearest_key(self.root, path)
        fix = f"did you mean {nearest}?" if nearest else "remove it; docs/configuration.md has all keys"
        self.provenance.report("unknown-key", path, raw, "there is no such key", fix)


def nearest_key(root: type, path: str) -> str | None:
    """Return the key or section that `path` may mean, or None.

    It is one of the same section whose name is misspelled or lacks a word in `path`, else one of the same name in
    another section. Similar letters alone do not count: another key is worse advice than none.
    """
    candidates = [name for name, info in known_keys(root).items() if info.spec.status is not Status.NO_EFFECT]
    candidates += known_sections(root)
    parent, _, leaf = path.rpartition(".")
    near = [name for name in candidates if name.rpartition(".")[0] == parent and _may_mean(leaf, name[len(parent) :])]
    if not near:
        top = path.partition(".")[0]
        near = [
            name
            for name in candidates
            if _letters(name.rpartition(".")[2]) == _letters(leaf)
            and ("_" in leaf or not parent or name.partition(".")[0] == top)
        ]
    return max(near, key=lambda name: difflib.SequenceMatcher(None, path, name).ratio(), default=None)


def _may_mean(name: str, other: str) -> bool:
    """Return whether `name` is `other` with misspelled words, or without one of three or more words."""
    given, words = name.split("_"), other.strip(".").split("_")
    if _letters(name) == "".join(words):
        return True
    shorter = [words[:skipped] + words[skipped + 1 :] for skipped in range(len(words))] if len(words) > 2 else []
    return any(
        len(given) == len(kept)
        and all(difflib.get_close_matches(word, [own], cutoff=0.75) for word, own in zip(given, kept, strict=True))
        for kept in (words, *shorter)
    )


def _letters(name: str) -> str:
    return name.replace("_", "")


def fit(raw: Any, hint: Any, spec: KeySpec) -> Any:
    """Return `raw` as a value of the type `hint`; raise `Unfit` if it is none."""
    if hint is Any:
        return raw
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    union = union_parts(hint)
    if len(union) > 1:
        if raw is None and type(None) in union:
            return None
        failures = []
        for part in union:
            if part is not type(None):
                try:
                    return fit(raw, part, spec)
                except Unfit as unfit:
                    failures.append(unfit)
        raise failures[0] if len(failures) == 1 else _expected(hint)
    if raw is None:
        raise Unfit(f"null is not allowed, {describe_type(hint)} is", "give a value, or remove the key")
    if origin is typing.Literal:
        return _choice(raw, parts, spec)
    if origin is list:
        items = [raw] if isinstance(raw, str) else raw
        if not isinstance(items, list):
            raise _expected(hint)
        return [fit(item, parts[0], spec) for item in items]
    if origin is dict:
        if not isinstance(raw, dict):
            raise Unfit("a section of keys is expected", "write keys under it")
        return raw
    return _scalar(raw, hint)


def _scalar(raw: Any, hint: Any) -> Any:
    if hint is bool and isinstance(raw, bool):
        return raw
    if hint is str and isinstance(raw, str | int | float) and not isinstance(raw, bool):
        return str(raw)
    if hint in (int, float) and isinstance(raw, int | float) and not isinstance(raw, bool):
        if isinstance(raw, float) and not math.isfinite(raw):
            raise Unfit("a finite number is expected", "give a finite number", "out-of-range")
        if (hint is int or isinstance(raw, int)) and abs(raw) > _LARGEST:
            raise Unfit("the number is too large", "give a smaller number", "out-of-range")
        if hint is float:
            return float(raw)
        if raw == int(raw):
            return int(raw)
    raise _expected(hint)


def _choice(raw: Any, choices: tuple[Any, ...], spec: KeySpec) -> Any:
    text = str(raw).lower()
    for spelling, choice in [*((str(choice), choice) for choice in choices), *spec.spellings.items()]:
        if spelling.lower() == text:
            return choice
    names = [str(choice) for choice in choices]
    close = difflib.get_close_matches(text, [*names, *spec.spellings], n=1, cutoff=0.75)
    hint = f"did you mean {close[0]}? " if close else ""
    raise Unfit("not one of the values this key takes", f"{hint}use one of {', '.join(names)}", "wrong-value")


def _expected(hint: Any) -> Unfit:
    expected = describe_type(hint)
    article = {"integer": "an ", "number": "a "}.get(expected.partition(" ")[0], "")
    return Unfit(f"the type does not fit, {expected} is expected", f"write {article}{expected}, without quotes")


def _allowed(hint: Any, spec: KeySpec, raw: Any) -> str:
    if typing.get_origin(hint) is typing.Literal:
        return " or ".join(str(choice) for choice in typing.get_args(hint))
    return "false" if raw is True else "another value"


def check_range(value: Any, spec: KeySpec) -> None:
    """Raise `Unfit` for a number outside the range of its key."""
    for number in value if isinstance(value, list) else [value]:
        if isinstance(number, bool) or not isinstance(number, int | float):
            continue
        if spec.minimum is not None and number < spec.minimum:
            raise Unfit(f"less than {spec.minimum:g}", f"use {spec.minimum:g} or more", "out-of-range")
        if spec.above is not None and number <= spec.above:
            raise Unfit(f"not above {spec.above:g}", f"use more than {spec.above:g}", "out-of-range")
        if spec.maximum is not None and number > spec.maximum:
            raise Unfit(f"more than {spec.maximum:g}", f"use {spec.maximum:g} or less", "out-of-range")
        if spec.below is not None and number >= spec.below:
            raise Unfit(f"not below {spec.below:g}", f"use less than {spec.below:g}", "out-of-range")
