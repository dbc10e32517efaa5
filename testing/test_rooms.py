"""The floors of the house: which room of a package imports which, and which package imports which.

A room is a folder or a top-level module of a package. The docstring of a folder's `__init__.py` ends with the line
``Uses: `room`, `room`.`` or ``Uses: nothing of this package.``; these tests compare that line with the imports of
every file in the room, those below `TYPE_CHECKING` included. A package's own `__init__.py`, which re-exports, may
import every room, and no room may import it.
"""

import ast
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = {
    path.name: path for folder in ("packages", "apps") for path in sorted(ROOT.glob(f"{folder}/*/src/mbridge_*"))
}
PACKAGES = {name for name, path in SOURCES.items() if path.is_relative_to(ROOT / "packages")}
APPS = set(SOURCES) - PACKAGES

MAY_IMPORT = {
    "mbridge_config": {"hydra", "omegaconf", "yaml"},
    "mbridge_model": {"megatron", "numpy", "safetensors", "torch", "transformers", "triton"},
    "mbridge_ckpt": {"numpy", "safetensors", "torch", "xxhash"},
}
"""Packages outside the standard library that each package which is useful alone may import."""


@dataclass(frozen=True, slots=True)
class Import:
    """An import of `module` (dotted) in the room `room`; `place` is its file and line."""

    room: str
    module: str
    place: str


def imports(source: Path) -> Iterator[Import]:
    """Yield all imports of the package in the folder `source`, except those of its `__init__.py`."""
    for path in sorted(source.rglob("*.py")):
        relative = path.relative_to(source)
        if relative == Path("__init__.py"):
            continue
        room = relative.parts[0].removesuffix(".py")
        shown = path.relative_to(ROOT) if path.is_relative_to(ROOT) else path
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                yield from (Import(room, alias.name, f"{shown}:{node.lineno}") for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                place = f"{shown}:{node.lineno}"
                assert node.module is not None and not node.level, f"{place}: write the import with its full name"
                # `from package import room`, or a name that the package's `__init__.py` exports.
                yield from (Import(room, f"{node.module}.{alias.name}", place) for alias in node.names)


def arrows(source: Path) -> dict[tuple[str, str], str]:
    """Return each pair of a room and another room that it imports, with the first place of such an import."""
    found: dict[tuple[str, str], str] = {}
    known = rooms(source)
    for it in imports(source):
        package, *rest = it.module.split(".")
        if package == source.name:
            target = rest[0] if rest and rest[0] in known else "__init__"
            if target != it.room:
                found.setdefault((it.room, target), it.place)
    return found


def rooms(source: Path) -> set[str]:
    folders = {path.parent.name for path in source.glob("*/*.py")}
    return folders | {path.stem for path in source.glob("*.py")} - {"__init__"}


def declared(init: Path) -> set[str]:
    """Return the rooms that the `Uses:` line of a room's `__init__.py` names."""
    docstring = ast.get_docstring(ast.parse(init.read_text(encoding="utf-8"))) or ""
    line = docstring.rpartition("\n")[2]
    if line == "Uses: nothing of this package.":
        return set()
    names = re.fullmatch(r"Uses: (`\w+`(?:, `\w+`)*)\.", line)
    assert names, f"{init}: the docstring's last line must read 'Uses: `room`, `room`.', but is {line!r}"
    return set(re.findall(r"`(\w+)`", names[1]))


def wrong_declarations(source: Path) -> list[str]:
    """Return a line for each arrow that a `Uses:` line does not name, and for each name without an arrow."""
    found = arrows(source)
    errors = [
        f"{place}: {room} -> {target}: a room may not import its own package's __init__"
        for (room, target), place in found.items()
        if target == "__init__"
    ]
    for room in sorted(rooms(source)):
        init = source / room / "__init__.py"
        if not (source / room).is_dir():
            continue
        if not init.is_file():
            errors.append(f"{source / room}: a room needs an __init__.py that says what it uses")
            continue
        named = declared(init)
        used = {target: place for (start, target), place in found.items() if start == room and target != "__init__"}
        errors += [
            f"{used[target]}: {room} -> {target} is not in the 'Uses:' line of {init}"
            for target in sorted(used.keys() - named)
        ]
        errors += [
            f"{init}: {room} -> {target} is in the 'Uses:' line, but unused" for target in sorted(named - used.keys())
        ]
    return errors


def circles(source: Path) -> dict[frozenset[str], list[str]]:
    """Return the sets of rooms that reach each other, each with the arrows between its rooms."""
    found = arrows(source)
    reached = {room: {room} for room in rooms(source) | {"__init__"}}
    grows = True
    while grows:
        before = sum(map(len, reached.values()))
        for start, target in found:
            reached[start] |= reached[target]
        grows = sum(map(len, reached.values())) > before
    groups = {frozenset(other for other in reached[room] if room in reached[other]) for room in reached}
    return {
        group: [f"{place}: {start} -> {target}" for (start, target), place in found.items() if {start, target} <= group]
        for group in groups
        if len(group) > 1
    }


def wrong_packages(source: Path) -> list[str]:
    """Return a line for each import of a package that `source` may not import."""
    name = source.name
    allowed = MAY_IMPORT.get(name, set(PACKAGES)) | {name}
    errors = []
    for it in imports(source):
        package = it.module.split(".")[0]
        is_ours = package.startswith("mbridge_")
        if package not in allowed and (is_ours or name in MAY_IMPORT) and package not in sys.stdlib_module_names:
            errors.append(f"{it.place}: {name} -> {package}: {name} may import {', '.join(sorted(allowed - {name}))}")
    return errors


def test_all_packages_are_found() -> None:
    assert set(PACKAGES) == {"mbridge_config", "mbridge_model", "mbridge_ckpt", "mbridge_train"}
    assert set(APPS) == {"mbridge_reasoning", "mbridge_sft"}


@pytest.mark.parametrize("name", sorted(SOURCES))
def test_a_room_uses_what_it_says(name: str) -> None:
    errors = wrong_declarations(SOURCES[name])
    assert not errors, "\n".join(["", *errors])


@pytest.mark.parametrize("name", sorted(SOURCES))
def test_arrows_go_down_only(name: str) -> None:
    lines = [line for group in circles(SOURCES[name]).values() for line in ["", *group]]
    assert not lines, "\n".join(["", f"circles among the rooms of {name}:", *lines])


@pytest.mark.parametrize("name", sorted(SOURCES))
def test_packages_import_what_lies_below(name: str) -> None:
    errors = wrong_packages(SOURCES[name])
    assert not errors, "\n".join(["", *errors])


def test_megatron_bridge_is_imported_in_one_module() -> None:
    """It is going to move into Megatron-LM, and then one file changes."""
    places = {
        it.place.rpartition(":")[0]
        for source in SOURCES.values()
        for it in imports(source)
        if it.module.startswith("megatron.bridge")
    }
    assert len(places) == 1, sorted(places)


@pytest.fixture
def house(tmp_path: Path) -> Path:
    """A package in order: `upper` imports `lower`, and `lower` the module `errors`."""
    source = tmp_path / "mbridge_config"
    files = {
        "__init__.py": "from mbridge_config.upper.file import up\n",
        "errors.py": "class ConfigError(Exception): ...\n",
        "lower/__init__.py": '"""Low.\n\nUses: `errors`.\n"""\n',
        "lower/file.py": "import json\nfrom mbridge_config.errors import ConfigError\n",
        "upper/__init__.py": '"""Up.\n\nUses: `lower`.\n"""\n',
        "upper/file.py": "def up() -> None:\n    from mbridge_config.lower import file\n",
    }
    for name, text in files.items():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text(text)
    return source


def test_a_house_in_order(house: Path) -> None:
    assert (wrong_declarations(house), circles(house), wrong_packages(house)) == ([], {}, [])


def test_wrong_declarations_are_named(house: Path) -> None:
    (house / "upper" / "file.py").write_text("import json\nimport mbridge_config.errors\n")
    (house / "errors.py").write_text("from mbridge_config import up\n")
    assert wrong_declarations(house) == [
        f"{house}/errors.py:1: errors -> __init__: a room may not import its own package's __init__",
        f"{house}/upper/file.py:2: upper -> errors is not in the 'Uses:' line of {house}/upper/__init__.py",
        f"{house}/upper/__init__.py: upper -> lower is in the 'Uses:' line, but unused",
    ]
    (house / "upper" / "__init__.py").write_text('"""Up."""\n')
    with pytest.raises(AssertionError, match="upper/__init__.py: the docstring's last line must read"):
        wrong_declarations(house)
    (house / "upper" / "__init__.py").unlink()
    assert wrong_declarations(house)[1:] == [f"{house}/upper: a room needs an __init__.py that says what it uses"]


def test_circles_are_named(house: Path) -> None:
    text = "from typing import TYPE_CHECKING\n\nif TYPE_CHECKING:\n    from mbridge_config.upper.file import up\n"
    (house / "errors.py").write_text(text)
    assert circles(house) == {
        frozenset({"errors", "lower", "upper"}): [
            f"{house}/errors.py:4: errors -> upper",
            f"{house}/lower/file.py:2: lower -> errors",
            f"{house}/upper/file.py:2: upper -> lower",
        ]
    }


def test_forbidden_packages_are_named(house: Path) -> None:
    (house / "errors.py").write_text("import os, torch.nn\nfrom mbridge_model import load\n")
    may = "mbridge_config may import hydra, omegaconf, yaml"
    assert wrong_packages(house) == [
        f"{house}/errors.py:1: mbridge_config -> torch: {may}",
        f"{house}/errors.py:2: mbridge_config -> mbridge_model: {may}",
    ]
    house = house.rename(house.with_name("mbridge_train"))  # which may use what it likes, except the apps
    (house / "errors.py").write_text("import torch, mbridge_model, mbridge_sft\n")
    (error,) = [line for line in wrong_packages(house) if "_sft" in line]
    assert error.startswith(f"{house}/errors.py:1: mbridge_train -> mbridge_sft: mbridge_train may import mbridge_")
    assert not [line for line in wrong_packages(house) if "-> torch" in line or "-> mbridge_model:" in line]
