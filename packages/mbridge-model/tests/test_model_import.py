"""Tests in separate processes: imports are cheap, loading is silent, a missing megatron-bridge is one error."""

import subprocess
import sys
from pathlib import Path

import pytest
from mbridge_model import ModelError
from mbridge_model.bridge import installed

from testing.tiny_models import make_model


def run(program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, timeout=600)


def test_import_is_cheap() -> None:
    program = """
import pkgutil, sys
import mbridge_model
assert not {module.name for module in pkgutil.iter_modules(mbridge_model.__path__)} & set(mbridge_model.__all__)
assert set(mbridge_model.__all__) == set(dir(mbridge_model)), dir(mbridge_model)
heavy = {"torch", "megatron", "transformers", "safetensors"} & set(sys.modules)
assert not heavy, heavy
mbridge_model.ModelError
assert "torch" not in sys.modules
try:
    mbridge_model.lode
except AttributeError as error:
    assert "lode" in str(error)
else:
    raise AssertionError
"""
    done = run(program)
    assert done.returncode == 0, done.stderr


def test_loading_prints_nothing_of_upstream(tmp_path: Path) -> None:
    make_model("qwen2", False, tmp_path)
    program = """
import logging, sys
logger = logging.getLogger("mbridge_model")
handler = logging.StreamHandler(sys.stdout)
handler.setFormatter(logging.Formatter("ours: %(message)s"))
logger.addHandler(handler)
logger.setLevel(logging.INFO)
from mbridge_model import export, load
model, handle = load(sys.argv[1])
assert sum(1 for _ in export(model, handle)) > 10
assert logging.root.manager.disable == 0
"""
    done = run(program, str(tmp_path))
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines and all(line.startswith("ours: ") for line in lines), done.stdout
    assert done.stderr == ""


INSTALL = "pip install --no-deps megatron-bridge==0.6.2"
WITHOUT_BRIDGE = 'import sys; sys.modules["megatron.bridge"] = None\n'  # as if it were not installed


def test_missing_megatron_bridge(tmp_path: Path) -> None:
    make_model("qwen2", False, tmp_path)
    program = """
from mbridge_model import ModelError, load
try:
    load(sys.argv[1])
except ModelError as error:
    print(error.exit_code, error)
"""
    done = run(WITHOUT_BRIDGE + program, str(tmp_path))
    said = f"2 megatron-bridge is not installed; run: {INSTALL} (with uv: uv {INSTALL})\n"
    assert done.stdout == said, done.stdout + done.stderr


def test_check_without_megatron_bridge() -> None:
    program = """
import sys
from mbridge_config.cli.main import main
assert main(["check", "reasoning/quickstart"]) == 0
assert "torch" not in sys.modules
"""
    done = run(WITHOUT_BRIDGE + program)
    said = f"megatron-bridge is not installed\n    fix: run: {INSTALL} (with uv: uv {INSTALL})\n"
    assert done.returncode == 0 and f"warning[incomplete-environment] {said}" in done.stdout, done.stdout + done.stderr
    assert "[incomplete-environment]" not in run(program).stdout


def test_another_version_of_megatron_bridge(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(installed, "VERSION", "0.9.9")
    with pytest.raises(
        ModelError, match=r"^megatron-bridge 0\.6\.2 is installed, and mbridge-model needs 0\.9\.9; run"
    ):
        installed.require_bridge()
