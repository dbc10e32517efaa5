"""Pinning versions: reading a lock, writing pins, and finding pins that are wrong."""

import importlib.util
import os
import shutil
import sys
import tomllib
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]
LOCK = """
version = 1
[[package]]
name = "zipp"
version = "2.0"
source = { registry = "anywhere" }
[[package]]
name = "attrs"
version = "1.5"
source = { registry = "anywhere" }
[[package]]
name = "ours"
version = "0.1"
source = { editable = "packages/ours" }
"""


@pytest.fixture(scope="module")
def pins() -> ModuleType:
    spec = importlib.util.spec_from_file_location("pins", ROOT / "tools" / "pins.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_locked_versions_are_those_from_registries(pins: ModuleType) -> None:
    assert pins.locked_versions(LOCK) == ["attrs==1.5", "zipp==2.0"]
    with pytest.raises(pins.PinError, match="zipp resolves to 2.0 and 3.0"):
        pins.locked_versions(LOCK.replace('name = "attrs"\nversion = "1.5"', 'name = "zipp"\nversion = "3.0"'))


def test_pins_are_replaced_between_the_markers_only(pins: ModuleType) -> None:
    text = f"[tool.uv]\nbefore = 1\n{pins.BEGIN}{pins.END}after = 2\n"
    once = pins.replace_pins(text, ["a==1"], ["hatchling==2"])
    assert tomllib.loads(once)["tool"]["uv"] == {
        "before": 1,
        "constraint-dependencies": ["a==1"],
        "build-constraint-dependencies": ["hatchling==2"],
        "after": 2,
    }
    assert pins.replace_pins(once, ["a==1"], ["hatchling==2"]) == once
    assert pins.replace_pins(once, [], []) == text
    with pytest.raises(pins.PinError, match="one line each"):
        pins.replace_pins("[tool.uv]\n", ["a==1"], [])


def test_differences_name_every_package(pins: ModuleType) -> None:
    assert pins.differences(["a==1", "b==1", "c==1"], ["a==1", "b==2", "d==4"]) == [
        "d==4 is not pinned",
        "b is pinned to 1 but resolves to 2",
        "c is pinned, but nothing needs it",
    ]
    assert pins.differences(["a==1"], ["a==1"]) == []


def test_workspace_is_pinned_by_a_real_resolution(
    pins: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A workspace with one package without dependencies, which uv resolves without a network."""
    uv = os.environ.get("UV") or shutil.which("uv") or shutil.which("uv", path=ROOT / ".uv" / "bin")
    if uv is None:
        pytest.skip("uv is not on PATH; `./uvw run` puts it there")
    monkeypatch.setenv("UV", uv)
    (tmp_path / ".python-version").write_text(f"{sys.version_info.major}.{sys.version_info.minor}\n")
    member = tmp_path / "packages" / "alone" / "pyproject.toml"
    member.parent.mkdir(parents=True)
    member.write_text(
        '[project]\nname = "alone"\nversion = "1.0"\nrequires-python = ">=3.12"\n'
        '[build-system]\nrequires = ["hatchling"]\nbuild-backend = "hatchling.build"\n'
    )
    text = (
        '[project]\nname = "root"\nversion = "1.0"\nrequires-python = ">=3.12"\ndependencies = ["alone"]\n'
        '[tool.uv]\npackage = false\n[tool.uv.workspace]\nmembers = ["packages/*"]\n'
        "[tool.uv.sources]\nalone = { workspace = true }\n"
    )
    (tmp_path / "pyproject.toml").write_text(text)
    assert pins.resolve(tmp_path, text) == []
    member.write_text(
        member.read_text().replace("[build-system]", 'dependencies = ["no-such-package-0f3a"]\n[build-system]')
    )
    monkeypatch.setenv("UV_OFFLINE", "1")
    with pytest.raises(pins.PinError, match="uv lock failed"):
        pins.resolve(tmp_path, text)
