"""The package needs Python 3.11 only. `nox -s config` runs its tests on each Python it supports."""

import ast
import tomllib
from pathlib import Path

import mbridge_config

SOURCES = Path(mbridge_config.__file__).parent
PROJECT = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())


def test_sources_are_python_3_11() -> None:
    files = list(SOURCES.rglob("*.py"))
    for file in files:
        ast.parse(file.read_text(encoding="utf-8"), feature_version=(3, 11))
    assert len(files) > 50
    # ruff looks for what the parser does not, such as the quotes in f-strings
    assert PROJECT["tool"]["ruff"]["target-version"] == "py311"


def test_what_the_package_says() -> None:
    assert PROJECT["project"]["requires-python"] == ">=3.11,<3.14"
    names = {requirement.partition(">")[0] for requirement in PROJECT["project"]["dependencies"]}
    assert names == {"hydra-core", "omegaconf", "pyyaml"}, "no torch, no other package of this workspace"
    noxfile = (Path(__file__).parents[3] / "noxfile.py").read_text()
    assert 'CONFIG_PYTHONS = ("3.11", "3.12", "3.13")' in noxfile
