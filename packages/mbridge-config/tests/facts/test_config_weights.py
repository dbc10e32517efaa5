"""Weight files that are missing or damaged."""

from collections.abc import Callable
from pathlib import Path

import pytest

from mbridge_config import Report

Checked = Callable[..., Report]


def test_missing_weights(checked: Checked, model: Path) -> None:
    (model / "model.safetensors").unlink()
    assert [problem.id for problem in checked().errors] == ["weights-missing"]
    (model / "model-00001-of-00002.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    index = model / "model.safetensors.index.json"
    index.write_text(
        '{"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}'
    )
    (problem,) = checked().errors
    assert "1 of 2 weight files" in problem.reason and "model-00002-of-00002.safetensors" in problem.reason
    index.write_text('{"weight_map": ')
    (problem,) = checked().errors
    assert "not valid JSON" in problem.reason


HEADER = b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}'


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (len(HEADER).to_bytes(8, "little") + HEADER + bytes(8), None),
        (len(HEADER).to_bytes(8, "little") + HEADER + bytes(7), "model.safetensors is truncated: its header describes"),
        (len(HEADER).to_bytes(8, "little") + HEADER + bytes(9), "is too long"),
        (len(HEADER).to_bytes(8, "little") + HEADER[:20], "is not a whole safetensors file (28 bytes)"),
        (b"", "is not a whole safetensors file (0 bytes)"),
        (b"version https://git-lfs.github.com/spec/v1", "is not a whole safetensors file"),
        ((4).to_bytes(8, "little") + b"[[]]", "no valid safetensors header"),
        ((4).to_bytes(8, "little") + b"\xff{}}", "no valid safetensors header"),
    ],
)
def test_damaged_weights(checked: Checked, model: Path, content: bytes, text: str | None) -> None:
    (model / "model.safetensors").write_bytes(content)
    errors = checked().errors
    assert [problem.id for problem in errors] == ([] if text is None else ["weights-damaged"])
    assert all(text in problem.reason for problem in errors if text)
