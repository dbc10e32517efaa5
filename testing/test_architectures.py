"""`mbridge-config check` refuses the architectures that `mbridge_model.load` refuses, and no others."""

import json
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from mbridge_config import ReasoningConfig, check
from mbridge_config.facts.architectures import ALL_LAYERS_HAVE_EXPERTS, TORCH, TRANSFORMER_ENGINE
from mbridge_config.load.compose import from_tree
from mbridge_config.schema.provenance import Provenance
from mbridge_model import ModelError
from mbridge_model.families import TORCH_ARCHITECTURES, check_architecture
from mbridge_model.provider.configure import resolve_backend

from testing.gang import Gang, WorkerPool

GEOMETRY = {"num_hidden_layers": 4, "hidden_size": 64, "num_attention_heads": 4, "vocab_size": 131}
EXPERTS: list[dict[str, Any]] = [
    {},
    {"mlp_only_layers": []},
    {"mlp_only_layers": [1]},
    {"decoder_sparse_step": 1},
    {"decoder_sparse_step": 2},
]


def bridge_architectures() -> list[str]:
    """Runs in a worker."""
    from mbridge_model.bridge.bridge import import_bridge

    return list(import_bridge().list_supported_models())


def test_tables(worker_pool: WorkerPool) -> None:
    (known,) = Gang(1, worker_pool).run(bridge_architectures)
    assert TORCH == TORCH_ARCHITECTURES
    # Another name of Qwen2.5-Omni, which the list leaves out.
    assert set(known) - TORCH | {"Qwen2_5OmniModel"} == TRANSFORMER_ENGINE
    assert set(known) >= TORCH


def refusal(directory: Path, backend: Literal["te", "torch"]) -> str | None:
    """Runs in a worker: what `load` says, or None where it gets as far as the weights."""
    from mbridge_model import load
    from megatron.core import parallel_state

    try:
        load(directory, backend=backend, weights=False)
    except ModelError as error:
        return str(error)
    finally:
        parallel_state.destroy_model_parallel()
    return None


MODELS = {
    "LlamaForCausalLM": ("llama", None),
    "Olmo2ForCausalLM": ("olmo2", "Megatron-Bridge cannot convert"),
    "Gemma2ForCausalLM": ("gemma2", "not built with plain torch layers"),
    "Qwen3NextForCausalLM": ("qwen3_next", "not built with plain torch layers"),
    "Qwen3_5ForCausalLM": ("qwen3_5_text", "not built with plain torch layers"),
    "DeepseekV3ForCausalLM": ("deepseek_v3", "not built with plain torch layers"),
    "GptOssForCausalLM": ("gpt_oss", "not built with plain torch layers"),
}


def refused(content: dict[str, Any], backend: Literal["te", "torch"]) -> bool:
    """Return whether `load` refuses the architecture."""
    try:
        check_architecture(content, backend)
    except ModelError:
        return True
    return False


def checked(directory: Path, backend: str) -> list[str]:
    """Return the reasons for which `check` refuses the architecture."""
    model = {"ckpt_convertor": {"hf_model_path": str(directory)}}
    tree = {"actor": {"megatron": model, "model": {"backend": backend}}}
    problems = check(from_tree(tree, Provenance(), ReasoningConfig, strict=False)).errors
    return [problem.reason for problem in problems if problem.id == "architecture"]


@pytest.mark.parametrize("name", MODELS)
def test_load_and_check_agree(worker_pool: WorkerPool, tmp_path: Path, name: str) -> None:
    kind, message = MODELS[name]
    content = GEOMETRY | {"architectures": [name], "model_type": kind, "intermediate_size": 88}
    (tmp_path / "config.json").write_text(json.dumps(content))
    (found,) = Gang(1, worker_pool).run(refusal, tmp_path, "torch")
    assert (found is None) == (message is None) == (not checked(tmp_path, "torch"))
    assert message is None or message in str(found)


@pytest.mark.parametrize("key", ["attention_bias", "mlp_bias"])
@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("LlamaForCausalLM", "llama"),
        ("Qwen3ForCausalLM", "qwen3"),
        ("Qwen2ForCausalLM", "qwen2"),
        ("GptOssForCausalLM", "gpt_oss"),
    ],
)
def test_biases(tmp_path: Path, name: str, kind: str, key: str) -> None:
    for value in (True, False):
        content = GEOMETRY | {"architectures": [name], "model_type": kind, key: value}
        (tmp_path / "config.json").write_text(json.dumps(content))
        expected = value and name in TORCH and (kind, key) != ("qwen2", "attention_bias")
        assert refused(content, "te") == expected == bool(checked(tmp_path, "te"))


@pytest.mark.parametrize("installed", [True, False])
def test_backend_auto(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, installed: bool) -> None:
    """An architecture without plain torch layers needs Transformer Engine, which `auto` takes where it is."""
    monkeypatch.setattr("mbridge_config.rules.start.find_spec", lambda name: object() if installed else None)
    monkeypatch.setattr("torch.cuda.is_available", lambda: installed)
    monkeypatch.setattr("megatron.core.extensions.transformer_engine.HAVE_TE", installed, raising=False)
    content = GEOMETRY | {"architectures": ["Gemma2ForCausalLM"], "model_type": "gemma2"}
    (tmp_path / "config.json").write_text(json.dumps(content))
    backends = [resolve_backend("auto", dtype, has_torch_layers=False) for dtype in (torch.float32, torch.bfloat16)]
    assert backends == ["te" if installed else "torch"] * 2
    assert resolve_backend("auto", torch.float32) == "torch"
    assert bool(checked(tmp_path, "auto")) == (not installed)


@pytest.mark.parametrize("experts", EXPERTS, ids=str)
@pytest.mark.parametrize("name", ALL_LAYERS_HAVE_EXPERTS)
def test_layers_without_experts(tmp_path: Path, name: str, experts: dict[str, Any]) -> None:
    content = GEOMETRY | {"architectures": [name], "model_type": "qwen3_moe", "num_experts": 4} | experts
    (tmp_path / "config.json").write_text(json.dumps(content))
    assert refused(content, "torch") == bool(checked(tmp_path, "torch")) == (experts in (EXPERTS[2], EXPERTS[4]))
