"""What a process of its own shows: imports are cheap, loading is silent, a missing megatron-bridge is one error."""

import subprocess
import sys
from pathlib import Path

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


def test_missing_megatron_bridge(tmp_path: Path) -> None:
    make_model("qwen2", False, tmp_path)
    program = """
import importlib.abc, sys
class Blocked(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == "megatron.bridge" or name.startswith("megatron.bridge."):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Blocked())
from mbridge_model import ModelError, load
try:
    load(sys.argv[1])
except ModelError as error:
    print(error)
"""
    done = run(program, str(tmp_path))
    assert done.stdout == ("megatron-bridge is not installed; run: pip install --no-deps megatron-bridge==0.6.2\n"), (
        done.stdout + done.stderr
    )
