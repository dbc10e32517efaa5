"""The command of each app where megatron-bridge is not installed."""

import sys
from pathlib import Path
from typing import Any

import mbridge_reasoning.cli
import mbridge_sft.cli
import pytest
from mbridge_train.run.application import run_application


@pytest.mark.parametrize("app", [mbridge_reasoning.cli.APPLICATION, mbridge_sft.cli.APPLICATION])
def test_without_megatron_bridge(
    app: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "megatron.bridge", None)  # as if it were not installed
    for name in ("RANK", "WORLD_SIZE", "SLURM_PROCID", "SLURM_NTASKS"):
        monkeypatch.delenv(name, raising=False)
    assert run_application(app, []) == 2
    install = "pip install --no-deps megatron-bridge==0.6.2"
    assert capsys.readouterr().err == (
        f"error: megatron-bridge is not installed; run: {install} (with uv: uv {install})\n"
    )
    assert not any(tmp_path.iterdir())
