"""A key that the schema calls honoured is read by some code, so that no setting is silently without effect."""

import ast
from importlib.util import find_spec
from pathlib import Path

import pytest
from mbridge_config import ReasoningConfig, key_table
from mbridge_config.keys import KeyInfo, Status

PACKAGES = ("mbridge_reasoning", "mbridge_train", "mbridge_config")
# These declare, fill in and describe keys; none of them acts on a value.
NOT_READERS = ("schema", "derive.py", "plan.py")


def sources() -> list[Path]:
    files = []
    for package in PACKAGES:
        spec = find_spec(package)
        assert spec is not None and spec.origin is not None
        root = Path(spec.origin).parent
        files += [file for file in root.rglob("*.py") if not set(NOT_READERS) & set(file.relative_to(root).parts)]
    return files


@pytest.fixture(scope="module")
def names_read() -> set[str]:
    """Attributes that the sources read, and all text in them, since some keys are looked up by their full name."""
    found = set()
    for file in sources():
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                found.add(node.attr)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.add(node.value)
    return found


def leaves_no_choice(info: KeyInfo) -> bool:
    """Whether every value but the default is refused or means the same, so that there is nothing to read."""
    return bool(info.spec.refused)


def test_honoured_keys_are_read(names_read: set[str]) -> None:
    honoured = [info for info in key_table(ReasoningConfig) if info.spec.status is Status.HONOURED]
    unread = [
        info.path
        for info in honoured
        if info.path.rpartition(".")[2] not in names_read and info.path not in names_read and not leaves_no_choice(info)
    ]
    assert unread == [], "read these, or declare them no_effect or refused"
    assert len(honoured) > 80


def test_a_key_that_nothing_reads_is_found(names_read: set[str]) -> None:
    """The search is not blind: keys without effect are, but for namesakes, not read."""
    without_effect = [info.path for info in key_table(ReasoningConfig) if info.spec.status is Status.NO_EFFECT]
    unread = [path for path in without_effect if path.rpartition(".")[2] not in names_read]
    assert len(unread) > 0.8 * len(without_effect)
