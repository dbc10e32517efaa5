"""A run on several hosts: the command on one host reports that it cannot start them all."""

import sys

import pytest
from mbridge_reasoning.cli import main


def test_several_hosts_need_torchrun(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("RANK", "WORLD_SIZE", "SLURM_PROCID", "SLURM_NTASKS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sys, "argv", ["mbridge-reasoning", "cluster.num_nodes=2"])
    assert main() == 2
    text = capsys.readouterr().err
    assert "error[one-host] cluster.num_nodes = 2" in text and "torchrun --nnodes=2" in text
