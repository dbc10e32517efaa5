"""`mbridge-config check` refuses the architectures that `mbridge_model.load` refuses, and no others."""

import json
from pathlib import Path
from typing import Any, Literal

import pytest
from mbridge_config import ReasoningConfig, check
from mbridge_config.facts.architectures import ALL_LAYERS_HAVE_EXPERTS, TORCH, TRANSFORMER_ENGINE
from mbridge_config.load.compose import from_tree
from mbridge_config.schema.provenance import Provenance
from mbridge_model import ModelError
from mbridge_model.families.architectures import TORCH_ARCHITECTURES, check_architecture

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


@pytest.mark.parametrize("experts", EXPERTS, ids=str)
@pytest.mark.parametrize("name", ALL_LAYERS_HAVE_EXPERTS)
def test_layers_without_experts(tmp_path: Path, name: str, experts: dict[str, Any]) -> None:
    content = GEOMETRY | {"architectures": [name], "model_type": "qwen3_moe", "num_experts": 4} | experts
    (tmp_path / "config.json").write_text(json.dumps(content))
    refused = False
    try:
        check_architecture(content, "torch")
    except ModelError:
        refused = True
    assert refused == bool(checked(tmp_path, "torch")) == (experts in (EXPERTS[2], EXPERTS[4]))
