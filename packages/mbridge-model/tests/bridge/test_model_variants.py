"""Variants of the families and other architectures: each agrees with transformers, or is refused by name."""

import json
import re
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from mbridge_model import Parallel
from safetensors.torch import load_file, save_file

from testing.gang import Gang, WorkerPool
from testing.megatron_forward import pack, run_forward

VOCAB_SIZE, TOLERANCE = 131, 1e-5

GEOMETRY: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 88,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
WINDOW = {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
LINEAR_ATTENTION = {
    "head_dim": 32,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}
LATENT_ATTENTION = {
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "n_group": 1,
    "topk_group": 1,
}
NO_TORCH = ", which is not built with plain torch layers; use backend 'te' on a GPU"

AGREE: dict[str, tuple[str, dict[str, Any]]] = {
    "mistral": ("MistralConfig", {"sliding_window": None}),
    "mistral, sliding window": ("MistralConfig", {"sliding_window": 5}),
    "gemma": ("GemmaConfig", {"head_dim": 32}),
    "nemotron (LayerNorm)": ("NemotronConfig", {}),
    "qwen3 mixture of experts": ("Qwen3MoeConfig", {"head_dim": 32} | EXPERTS),
    "qwen2, sliding window in two layers": ("Qwen2Config", WINDOW),
    "qwen3, sliding window in two layers": ("Qwen3Config", {"head_dim": 32} | WINDOW),
    "qwen2, YaRN": ("Qwen2Config", {"rope_scaling": YARN}),
    "mistral, YaRN": ("MistralConfig", {"sliding_window": None, "rope_scaling": YARN}),
    "mistral, YaRN with other turns": (
        "MistralConfig",
        {"sliding_window": None, "rope_scaling": YARN | {"beta_fast": 16.0, "beta_slow": 2.0, "truncate": False}},
    ),
    "llama, dynamic RoPE up to its length": (
        "LlamaConfig",
        {"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}, "max_position_embeddings": 18},
    ),
    "llama, linear RoPE": ("LlamaConfig", {"rope_scaling": {"rope_type": "linear", "factor": 4.0}}),
    "llama, llama3 RoPE": ("LlamaConfig", {"rope_scaling": LLAMA3 | {"original_max_position_embeddings": 8192}}),
    "llama, head_dim": ("LlamaConfig", {"head_dim": 32}),
    "llama, gelu": ("LlamaConfig", {"hidden_act": "gelu"}),
    "one group of keys": ("LlamaConfig", {"num_key_value_heads": 1}),
}
REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "llama, attention bias": (
        "LlamaConfig",
        {"attention_bias": True},
        "attention_bias True, .* LlamaForCausalLM without",
    ),
    "llama, MLP bias": ("LlamaConfig", {"mlp_bias": True}, "has mlp_bias True, .* LlamaForCausalLM without"),
    "qwen3, attention bias": (
        "Qwen3Config",
        {"attention_bias": True},
        "attention_bias True, .* Qwen3ForCausalLM without",
    ),
    "llama3 RoPE of another length": (
        "LlamaConfig",
        {"rope_scaling": LLAMA3 | {"original_max_position_embeddings": 32}},
        r"rotary embedding differs from what config\.json says in rope_parameters",
    ),
    "long RoPE": (
        "LlamaConfig",
        {"rope_scaling": {"rope_type": "longrope", "short_factor": [2.0] * 8, "long_factor": [3.0] * 8, "factor": 4.0}},
        r"rotary embedding differs from what config\.json says in rope_parameters",
    ),
    "gemma 2": ("Gemma2Config", {"head_dim": 32, "sliding_window": 5}, "Gemma2ForCausalLM" + NO_TORCH),
    "gemma 3": ("Gemma3TextConfig", {"head_dim": 32, "sliding_window": 5}, "Gemma3ForCausalLM" + NO_TORCH),
    "gpt-oss": ("GptOssConfig", {"head_dim": 32, "num_local_experts": 4}, "GptOssForCausalLM" + NO_TORCH),
    "qwen3-next": ("Qwen3NextConfig", LINEAR_ATTENTION | EXPERTS, "Qwen3NextForCausalLM" + NO_TORCH),
    "qwen3.5": ("Qwen3_5TextConfig", LINEAR_ATTENTION, "Qwen3_5ForCausalLM" + NO_TORCH),
    "deepseek-v3": ("DeepseekV3Config", LATENT_ATTENTION, "DeepseekV3ForCausalLM" + NO_TORCH),
    "qwen3 mixture of experts, dense layers": (
        "Qwen3MoeConfig",
        {"head_dim": 32, "mlp_only_layers": [1]} | EXPERTS,
        r"config\.json has mlp_only_layers \[1\], so some layers of this Qwen3MoeForCausalLM have no experts",
    ),
    "qwen3 mixture of experts in every second layer": (
        "Qwen3MoeConfig",
        {"head_dim": 32, "decoder_sparse_step": 2} | EXPERTS,
        r"config\.json has decoder_sparse_step 2, so some layers",
    ),
    "olmo 2": ("Olmo2Config", {}, "Megatron-Bridge cannot convert .*'Olmo2ForCausalLM' is not yet supported"),
}


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Makes the random model of a case once, with what transformers says of it in a .pt file beside it."""
    root = tmp_path_factory.mktemp("variants")

    @cache
    def build(case: str) -> Path:
        import transformers

        name, changes = (AGREE | REFUSED)[case][:2]
        directory = root / re.sub(r"\W+", "-", case)
        # The Auto classes would take Gemma 3 for the larger model with vision.
        config = getattr(transformers, name)(**(GEOMETRY | changes))
        model = transformers.AutoModelForCausalLM.from_config(config).eval()
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter_name, parameter in model.named_parameters():
                zero_centered = name.startswith(("Gemma", "Nemotron"))
                center = 1.0 if "norm" in parameter_name and not zero_centered else 0.0
                scale = 0.1 if parameter.dim() == 1 else parameter.shape[-1] ** -0.5
                parameter.copy_(center + scale * torch.randn(parameter.shape, generator=generator))
        model.save_pretrained(directory)
        tokens = torch.randint(VOCAB_SIZE, (2, 18), generator=generator)
        packed = [torch.randint(VOCAB_SIZE, (length,), generator=generator) for length in (7, 1, 13)]
        with torch.no_grad():
            content = {
                "dense": (tokens, model(tokens).logits),
                "packed": (packed, [model(row[None]).logits[0] for row in packed]),
            }
        torch.save(content, directory.with_suffix(".pt"))
        return directory

    return build


def compare(directory: Path, parallel: Parallel, dtype: torch.dtype = torch.float32) -> tuple[float, float, list[str]]:
    """Runs in a worker. Largest differences of dense and packed logits; exported tensors that are not bit-exact."""
    from mbridge_model import export, load
    from megatron.core import parallel_state

    reference = torch.load(directory.with_suffix(".pt"), weights_only=True)
    model, handle = load(directory, parallel, dtype=dtype)
    try:
        for chunk in model:
            chunk.eval()
        tokens, expected = reference["dense"]
        logits = run_forward(model, tokens, VOCAB_SIZE)
        assert logits is not None
        dense = (logits.float() - expected).abs().max().item()
        sequences, expected_rows = reference["packed"]
        row, packing, starts = pack(sequences, 1)
        logits = run_forward(model, row, VOCAB_SIZE, packing)
        assert logits is not None
        packed = max(
            (logits[0, start : start + len(want)].float() - want).abs().max().item()
            for start, want in zip(starts, expected_rows, strict=True)
        )
        source = load_file(directory / "model.safetensors")
        exported = {name: tensor.clone() for name, tensor in export(model, handle)}
        wrong = set(source) ^ set(exported)
        wrong |= {
            name for name in set(source) & set(exported) if not torch.equal(source[name].to(dtype), exported[name])
        }
        return dense, packed, sorted(wrong)
    finally:
        parallel_state.destroy_model_parallel()


@pytest.mark.parametrize("case", AGREE)
def test_agrees(worker_pool: WorkerPool, make: Callable[[str], Path], case: str) -> None:
    ((dense, packed, wrong),) = Gang(1, worker_pool).run(compare, make(case), Parallel())
    assert dense <= TOLERANCE
    assert packed <= TOLERANCE
    assert wrong == []


# What tensor parallelism could treat in another way: windows, zero-centered norms, LayerNorm, fewer groups than ranks.
@pytest.mark.parametrize("case", ["mistral, sliding window", "gemma", "nemotron (LayerNorm)", "one group of keys"])
def test_agrees_on_two_ranks(gang2: Gang, make: Callable[[str], Path], case: str) -> None:
    for dense, packed, wrong in gang2.run(compare, make(case), Parallel(tensor=2)):
        assert dense <= TOLERANCE
        assert packed <= TOLERANCE
        assert wrong == []


def test_bfloat16_is_near_fp32(worker_pool: WorkerPool, make: Callable[[str], Path]) -> None:
    ((dense, packed, wrong),) = Gang(1, worker_pool).run(compare, make("mistral"), Parallel(), torch.bfloat16)
    # 8 bits of mantissa, logits up to 4: an error of each layer's rounding, and not of fp32's.
    assert 1e-3 < dense < 0.15
    assert 1e-3 < packed < 0.15
    assert wrong == []


def refusal(directory: Path, parallel: Parallel | None = None) -> str:
    """Runs in a worker."""
    from mbridge_model import ModelError, load
    from megatron.core import parallel_state

    try:
        load(directory, parallel)
    except ModelError as error:
        return str(error)
    finally:
        parallel_state.destroy_model_parallel()
    return "loaded"


@pytest.mark.parametrize("case", REFUSED)
def test_refused(worker_pool: WorkerPool, make: Callable[[str], Path], case: str) -> None:
    (message,) = Gang(1, worker_pool).run(refusal, make(case))
    assert re.search(REFUSED[case][2], message), message


def forward_beyond(directory: Path) -> str:
    """Runs in a worker. The model has `max_position_embeddings` 18."""
    from mbridge_model import ModelError, load
    from megatron.core import parallel_state

    model, _ = load(directory)
    try:
        run_forward(model, torch.zeros((1, 19), dtype=torch.int64), VOCAB_SIZE)
    except ModelError as error:
        return str(error)
    finally:
        parallel_state.destroy_model_parallel()
    return "computed"


def test_dynamic_rope_ends_at_its_length(worker_pool: WorkerPool, make: Callable[[str], Path]) -> None:
    (message,) = Gang(1, worker_pool).run(forward_beyond, make("llama, dynamic RoPE up to its length"))
    assert re.match("a sequence has 19 tokens, .* rope_type 'dynamic' and max_position_embeddings 18, ", message)


def changed(source: Path, target: Path, config: dict[str, Any], tensors: Callable[[dict[str, Any]], Any]) -> Path:
    """Copy a directory with changes of its config.json and of its tensors."""
    shutil.copytree(source, target)
    before = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(before | config))
    content = load_file(target / "model.safetensors")
    tensors(content)
    save_file(content, target / "model.safetensors")
    return target


BROKEN: dict[str, tuple[dict[str, Any], Callable[[dict[str, Any]], Any], str]] = {
    "tied, with another output layer": (
        {"tie_word_embeddings": True},
        lambda tensors: None,
        r"config\.json ties .* \(tie_word_embeddings\), but 'lm_head\.weight' in .*model\.safetensors differs from "
        r"'model\.embed_tokens\.weight' in 131 of 131 rows, .*; write \"tie_word_embeddings\": false",
    ),
    "NaN": (
        {},
        lambda tensors: tensors["model.layers.2.self_attn.k_proj.weight"][3, 5].fill_(torch.nan),
        r"1 tensor\(s\) hold NaN.*, first 'model\.layers\.2\.self_attn\.k_proj\.weight' in .*model\.safetensors; ",
    ),
    "infinity": (
        {},
        lambda tensors: tensors["model.embed_tokens.weight"][130, 0].fill_(-torch.inf),
        r"1 tensor\(s\) hold NaN, infinity .*, first 'model\.embed_tokens\.weight' in .*model\.safetensors; ",
    ),
    "code of its own": (
        {"architectures": ["OtherForCausalLM"], "auto_map": {"AutoModelForCausalLM": "modeling_other.Other"}},
        lambda tensors: None,
        r"config\.json says in auto_map that OtherForCausalLM is computed by .*modeling_other\.Other.*; use",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_directory(worker_pool: WorkerPool, make: Callable[[str], Path], tmp_path: Path, case: str) -> None:
    config, tensors, pattern = BROKEN[case]
    directory = changed(make("mistral"), tmp_path / "broken", config, tensors)
    (message,) = Gang(1, worker_pool).run(refusal, directory)
    assert re.search(pattern, message), message


def test_every_rank_learns_of_nan(gang2: Gang, make: Callable[[str], Path], tmp_path: Path) -> None:
    """Only the second pipeline stage has the tensor."""
    config, tensors, pattern = BROKEN["NaN"]
    directory = changed(make("mistral"), tmp_path / "broken", config, tensors)
    for message in gang2.run(refusal, directory, Parallel(pipeline=2), timeout=60):
        assert re.search(pattern, message), message


def test_a_copy_of_the_embedding_is_no_other_output_layer(
    worker_pool: WorkerPool, make: Callable[[str], Path], tmp_path: Path
) -> None:
    def copy_embedding(tensors: dict[str, Any]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    directory = changed(make("mistral"), tmp_path / "copy", {"tie_word_embeddings": True}, copy_embedding)
    assert Gang(1, worker_pool).run(refusal, directory) == ["loaded"]
