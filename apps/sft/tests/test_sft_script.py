"""run_vlm_sft.sh: the app and the configs that it starts; what it shares is tested with the reasoning app's script."""

import os
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "run_vlm_sft.sh"


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """With a torchrun on PATH that prints its arguments."""
    for name, text in (("torchrun", 'printf "%s\\n" "$@"'), ("mbridge-sft", "true"), ("nvidia-smi", "exit 9")):
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    names = {"NNODES", "NODE_RANK", "NPROC_PER_NODE", "MASTER_ADDR", "CUDA_VISIBLE_DEVICES"}
    kept = {name: value for name, value in os.environ.items() if name not in names}
    return kept | {"PATH": f"{tmp_path}:{kept['PATH']}"}


def run(environment: dict[str, str], *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["bash", str(SCRIPT), *words], env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe"])
def test_starts_the_app(environment: dict[str, str], family: str) -> None:
    config = f"{family}_megatron_sft_vlm"
    result = run(environment, config, "actor.model.model_path=a b")
    assert result.stdout.splitlines() == [
        "--standalone",
        "--nnodes=1",
        "--nproc-per-node=1",
        "-m",
        "mbridge_sft.cli",
        "--config-name",
        config,
        "actor.model.model_path=a b",
    ]


def test_says_what_configs_there_are(environment: dict[str, str]) -> None:
    result = run(environment, "qwen9")
    assert result.returncode == 2
    assert result.stderr.startswith(
        "run_vlm_sft.sh: no config 'qwen9'; there are: quickstart qwen2_5_vl_megatron_sft_vlm"
    )
    assert "MASTER_ADDR" in run(environment, "--help").stdout
