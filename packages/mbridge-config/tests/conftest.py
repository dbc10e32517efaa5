"""Model directories and YAML files for the tests of mbridge-config."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mbridge_config import HFFacts, ReasoningConfig, Report, check, compose

GEOMETRY = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "num_hidden_layers": 6,
    "hidden_size": 96,
    "intermediate_size": 168,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "vocab_size": 211,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
}


NO_TENSORS = (2).to_bytes(8, "little") + b"{}"
"""The shortest safetensors file: the length of its header, and a header without tensors."""


def write_model(directory: Path, *, tokens: int = 200, **changes: Any) -> Path:
    """config.json, tokenizer.json and a weight file without tensors; a change to None leaves a field out."""
    directory.mkdir(parents=True, exist_ok=True)
    config = {name: value for name, value in (GEOMETRY | changes).items() if value is not None}
    (directory / "config.json").write_text(json.dumps(config))
    vocabulary = {f"t{number}": number for number in range(tokens - 1)}
    added = [{"id": tokens - 1, "content": "<end>"}]
    (directory / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocabulary}, "added_tokens": added}))
    (directory / "model.safetensors").write_bytes(NO_TENSORS)
    return directory


@pytest.fixture
def geometry() -> dict[str, Any]:
    """config.json of the good model."""
    return dict(GEOMETRY)


@pytest.fixture
def make_model() -> Callable[..., Path]:
    """`make_model(directory, tokens=..., field=value, ...)` writes a model directory."""
    return write_model


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A good model directory."""
    return write_model(tmp_path / "model")


@pytest.fixture
def run_python() -> Callable[..., str]:
    """`run_python(code)`: what the code prints in a fresh interpreter."""

    def run(code: str) -> str:
        environment = os.environ | {"PYTHONDONTWRITEBYTECODE": "0"}
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


@pytest.fixture
def yaml(tmp_path: Path, model: Path) -> Path:
    """A good config named `run` in a directory of its own."""
    data = tmp_path / "data.jsonl"
    data.write_text('{"prompt": "1+1", "solutions": ["2"]}\n')
    directory = tmp_path / "configs"
    directory.mkdir()
    (directory / "run.yaml").write_text(f"""\
runner:
  seq_length: 256
data:
  max_prompt_length: 64
  rollout_batch_size: 16
  train_data_paths: [{data}]
algorithm:
  group_size: 4
actor:
  micro_batch_size: 2
  tokenizer:
    tokenizer_model: {model}
  megatron:
    ckpt_convertor:
      hf_model_path: {model}
""")
    return directory


@pytest.fixture
def composed(yaml: Path) -> Callable[..., ReasoningConfig]:
    """`composed("key=value", ...)`: the good config with overrides."""
    return lambda *overrides: compose("run", yaml, overrides, schema=ReasoningConfig)


@pytest.fixture
def checked(yaml: Path) -> Callable[..., Report]:
    """`checked("key=value", ..., world_size=N)`: the report on the good config with overrides."""

    def run(*overrides: str, world_size: int | None = None) -> Report:
        return check(compose("run", yaml, overrides, schema=ReasoningConfig, strict=False), world_size)

    return run


@pytest.fixture
def real_model(tmp_path: Path) -> Callable[[str], Path]:
    """`real_model("qwen2.5-7b")` writes a directory with the config.json of a published model, from geometries/."""

    def write(name: str) -> Path:
        directory = write_model(tmp_path / name)
        (directory / "config.json").write_text((Path(__file__).parent / "geometries" / f"{name}.json").read_text())
        return directory

    return write


@pytest.fixture
def real_facts(real_model: Callable[[str], Path]) -> Callable[[str], HFFacts]:
    """`real_facts("qwen2.5-7b")`: the facts of a published model."""
    return lambda name: HFFacts.load(real_model(name))
