"""Find the keys of a config that no code reads, so that no setting is silently ignored."""

import ast
from importlib.util import find_spec
from pathlib import Path

from mbridge_config import key_table
from mbridge_config.schema.keys import Status

# These files declare, fill in and describe keys; none acts on a value.
NOT_READERS = ("schema", "compat", "defaults.py", "plan.py")


def unread_keys(schema: type, packages: tuple[str, ...], status: Status) -> tuple[list[str], int]:
    """Return the keys of `schema` with this status that no package reads, and how many keys have the status.

    A key counts as read if an attribute of its name is read, or if its full name occurs in the sources. Keys without a
    choice, because every value but the default is refused or means the same, are not listed.
    """
    names = _names_read(packages)
    infos = [info for info in key_table(schema) if info.spec.status is status]
    unread = [
        info.path
        for info in infos
        if info.path.rpartition(".")[2] not in names and info.path not in names and not info.spec.refused
    ]
    return unread, len(infos)


def _names_read(packages: tuple[str, ...]) -> set[str]:
    """Return the attributes that the sources read, and their text, since some keys are looked up by full name."""
    found = set()
    for file in _sources(packages):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                found.add(node.attr)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.add(node.value)
    return found


def _sources(packages: tuple[str, ...]) -> list[Path]:
    files = []
    for package in packages:
        spec = find_spec(package)
        assert spec is not None and spec.origin is not None
        root = Path(spec.origin).parent
        files += [file for file in root.rglob("*.py") if not set(NOT_READERS) & set(file.relative_to(root).parts)]
    return files
