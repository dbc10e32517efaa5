"""Which functions are compiled, and the fallback where none can be."""

import logging
from pathlib import Path

import pytest
import torch
import torch._dynamo.config
from mbridge_model.patches.compiled import UNCOMPILED, compiled_on_gpu, run_uncompiled_without_compiler


def test_runs_as_written_on_a_cpu() -> None:
    calls = []

    @compiled_on_gpu
    def double(values: torch.Tensor) -> torch.Tensor:
        calls.append(values)  # a compiled function would not append on its second call
        return 2 * values

    assert [double(torch.ones(1)).item() for _ in range(2)] == [2, 2] and len(calls) == 2


@pytest.mark.parametrize("missing", ["compiler", "headers", None])
def test_without_a_compiler(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path, missing: str | None
) -> None:
    monkeypatch.setattr(torch._dynamo.config, "disable", False)
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    if missing != "compiler":
        (tmp_path / "clang").touch(mode=0o755)
    if missing != "headers":
        (tmp_path / "Python.h").touch()
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"include": str(tmp_path)})
    with caplog.at_level(logging.WARNING, "mbridge_model"):
        run_uncompiled_without_compiler()
        run_uncompiled_without_compiler()
    expected = {"compiler": "gcc or clang", "headers": str(tmp_path / "Python.h")}
    assert torch._dynamo.config.disable == (missing is not None)
    assert len(caplog.messages) == (missing is not None), "once"
    assert missing is None or expected[missing] in caplog.messages[0]
    if missing is not None:
        failing = torch.compile(lambda values: 2 * values, backend=_fail)
        assert failing(torch.ones(1)).item() == 2
    UNCOMPILED.undo()
    assert not torch._dynamo.config.disable


def _fail(*_: object) -> None:
    raise AssertionError("compiled")
