"""The public API of the package, and the code of its README."""

import re
import subprocess
import sys
from pathlib import Path

import mbridge_train
import pytest

from testing.tiny_models import make_model

README = Path(__file__).parents[1] / "README.md"


def test_public_names_are_there() -> None:
    for name in mbridge_train.__all__:
        assert getattr(mbridge_train, name).__name__ == name
    assert dir(mbridge_train) == sorted(mbridge_train.__all__)
    with pytest.raises(AttributeError, match="no attribute 'engin'"):
        mbridge_train.engin  # noqa: B018


def test_import_is_light() -> None:
    """Importing the package, or the modules that start ranks, imports neither torch nor Megatron."""
    code = "import sys, mbridge_train, mbridge_train.run.launch; print({'torch', 'megatron'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"


def test_examples_of_the_readme_run(tmp_path: Path) -> None:
    make_model("qwen2", True, tmp_path / "model")
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == 3
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", "\n".join(blocks)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    losses = [float(line) for line in result.stdout.split()]
    assert losses[-1] < losses[0]


def test_tests_that_the_readme_names_are_there() -> None:
    text = README.read_text(encoding="utf-8")
    named = re.findall(r"`(test_\w+)\.(test_\w+)`", text)
    assert len(named) >= 10
    for file, function in named:
        (path,) = Path(__file__).parent.rglob(f"{file}.py")
        source = path.read_text(encoding="utf-8")
        assert f"def {function}(" in source, f"{file}.{function}"
