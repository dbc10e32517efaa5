"""run_main_grpo_math.sh: the arguments that it gives to torchrun, and its messages on failure."""

import os
import re
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "run_main_grpo_math.sh"
CONFIG = "qwen2.5-1.5b-grpo-megatron"


@pytest.fixture
def run(tmp_path):
    """Run the script from an unrelated directory, with programs that print their arguments on PATH."""

    def program(name: str, text: str) -> None:
        path = tmp_path / name
        path.write_text(f"#!/bin/sh\n{text}\n")
        path.chmod(0o755)

    program("torchrun", 'printf "%s\\n" "$@"')
    program("mbridge-reasoning", "true")

    def start(*words: str, gpus: int = 0, **environment: str) -> subprocess.CompletedProcess[str]:
        program("nvidia-smi", "\n".join(f"echo 'GPU {number}: H100'" for number in range(gpus)) or "exit 9")
        names = {"NNODES", "NODE_RANK", "NPROC_PER_NODE", "MASTER_ADDR", "MASTER_PORT", "CUDA_VISIBLE_DEVICES"}
        base = {name: value for name, value in os.environ.items() if name not in names}
        base["PATH"] = f"{tmp_path}:{base['PATH']}"
        return subprocess.run(
            ["bash", str(SCRIPT), *words], cwd=tmp_path, env={**base, **environment}, capture_output=True, text=True
        )

    return start


def test_one_host_one_process_a_gpu(run):
    result = run(CONFIG, "runner.max_steps=3", "data.train_data_paths=[a b.jsonl]", gpus=8)
    assert result.stdout.splitlines() == [
        "--standalone",
        "--nnodes=1",
        "--nproc-per-node=8",
        "-m",
        "mbridge_reasoning.cli",
        "--config-name",
        CONFIG,
        "runner.max_steps=3",
        "data.train_data_paths=[a b.jsonl]",
    ]
    assert result.returncode == 0


@pytest.mark.parametrize(
    ("words", "environment", "processes"),
    [
        ([], {}, 1),
        ([], {"CUDA_VISIBLE_DEVICES": "2,5,7"}, 3),
        (["launcher.nproc_per_node=2"], {"CUDA_VISIBLE_DEVICES": "2,5,7"}, 2),
        (["launcher.nproc_per_node=null"], {}, 1),
        ([], {"NPROC_PER_NODE": "4"}, 4),
    ],
)
def test_processes_of_a_host(run, words, environment, processes):
    result = run(f"config/math/{CONFIG}.yaml", *words, **environment)
    assert f"--nproc-per-node={processes}" in result.stdout.splitlines()


def test_several_hosts(run):
    lines = run(CONFIG, "cluster.num_nodes=4", gpus=8, MASTER_ADDR="host0", NODE_RANK="3").stdout.splitlines()
    assert lines[:5] == [
        "--nnodes=4",
        "--node-rank=3",
        "--master-addr=host0",
        "--master-port=29500",
        "--nproc-per-node=8",
    ]


@pytest.mark.parametrize(
    ("words", "environment", "text"),
    [
        ([], {}, rf"which config\? .*{CONFIG}"),
        (["runner.max_steps=3"], {}, "'runner.max_steps=3' is a setting"),
        (["qwen9"], {}, f"no config 'qwen9'; there are: .*{CONFIG}"),
        ([CONFIG, "cluster.num_nodes=2"], {"NODE_RANK": "0"}, "needs MASTER_ADDR"),
        ([CONFIG, "cluster.num_nodes=2"], {"MASTER_ADDR": "host0"}, "needs NODE_RANK: .* then 1 ... 1"),
        ([CONFIG, "cluster.num_nodes=two"], {}, "cluster.num_nodes=two is not a number"),
        ([CONFIG, "launcher.nproc_per_node=x"], {}, "launcher.nproc_per_node=x is not a number"),
    ],
)
def test_mistakes(run, words, environment, text):
    result = run(*words, **environment)
    assert result.returncode == 2
    assert result.stdout == ""
    assert re.search(text, result.stderr), result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_help_names_the_configs(run):
    result = run("--help")
    assert result.returncode == 0
    assert "MASTER_ADDR" in result.stdout
    assert CONFIG in result.stdout
