"""Tiny random HuggingFace models of each family, with sizes that no parallel size divides evenly."""

from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedConfig, PreTrainedModel

VOCAB_SIZE = 131  # prime: no tensor-parallel size divides it

GEOMETRY = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 88,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}

CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "qwen2": ("Qwen2Config", {}),
    "qwen3": ("Qwen3Config", {"head_dim": 32}),
    # The geometry of DeepSeek-R1-Distill-Qwen-1.5B except vocabulary and depth: 12 heads in 2 groups, large RoPE base.
    "r1-distill-qwen-1.5b": (
        "Qwen2Config",
        {
            "hidden_size": 1536,
            "intermediate_size": 8960,
            "num_hidden_layers": 2,
            "num_attention_heads": 12,
            "num_key_value_heads": 2,
            "rope_theta": 10000.0,
            "rms_norm_eps": 1e-6,
            "max_position_embeddings": 131072,
        },
    ),
}

IMAGE_TOKEN, VIDEO_TOKEN, VISION_START, VISION_END = 120, 121, 122, 123
MERGE_SIZE = 2  # patches along height, and along width, of one token
PATCH_FEATURES = 3 * 2 * 4 * 4  # channels, frames, height and width of a patch

_VISION = {
    "depth": 4,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_heads": 2,
    "patch_size": 4,
    "temporal_patch_size": 2,
    "spatial_merge_size": MERGE_SIZE,
    "out_hidden_size": 64,
}
_QWEN3_VISION = _VISION | {"num_position_embeddings": 36, "deepstack_visual_indexes": [0, 2, 3]}
_INTERLEAVED = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [6, 5, 5], "mrope_interleaved": True}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}

# Configuration class, text part, vision part.
VISION_CONFIGS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "qwen2_5_vl": (
        "Qwen2_5_VLConfig",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}},
        # Windows of 2 x 2 tokens.
        _VISION | {"window_size": 16, "fullatt_block_indexes": [1, 3], "tokens_per_second": 3},
    ),
    "qwen3_vl": ("Qwen3VLConfig", {"head_dim": 32, "rope_parameters": _INTERLEAVED}, _QWEN3_VISION),
    "qwen3_vl_moe": (
        "Qwen3VLMoeConfig",
        {"head_dim": 32, "rope_parameters": _INTERLEAVED} | _EXPERTS,
        _QWEN3_VISION,
    ),
}


def make_model(family: str, tied: bool, directory: Path, **changes: int) -> PreTrainedModel:
    """Write a random fp32 model to `directory` and return it in evaluation mode.

    Norm weights and biases are random, too, so that tests notice a lost or misplaced one.
    """
    name, overrides = CONFIGS[family]
    config = getattr(transformers, name)(**(GEOMETRY | overrides | changes), tie_word_embeddings=tied)
    return _write(transformers.AutoModelForCausalLM.from_config(config), directory)


def make_vision_model(
    family: str, tied: bool, directory: Path, text: dict[str, Any] | None = None, vision: dict[str, Any] | None = None
) -> PreTrainedModel:
    """Write a random fp32 vision-language model, with changes to its text and vision configurations."""
    config = vision_config(family, tied, text, vision)
    return _write(transformers.AutoModelForImageTextToText.from_config(config), directory)


def vision_config(
    family: str, tied: bool, text: dict[str, Any] | None = None, vision: dict[str, Any] | None = None
) -> PreTrainedConfig:
    name, text_part, vision_part = VISION_CONFIGS[family]
    config: PreTrainedConfig = getattr(transformers, name)(
        text_config=GEOMETRY | {"bos_token_id": 1, "eos_token_id": 2} | text_part | (text or {}),
        vision_config=vision_part | (vision or {}),
        image_token_id=IMAGE_TOKEN,
        video_token_id=VIDEO_TOKEN,
        vision_start_token_id=VISION_START,
        vision_end_token_id=VISION_END,
        tie_word_embeddings=tied,
    )
    return config


def _write(model: PreTrainedModel, directory: Path) -> PreTrainedModel:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            center = 1.0 if "norm" in parameter_name or "ln_q" in parameter_name else 0.0
            scale = 0.1 if parameter.dim() == 1 else parameter.shape[-1] ** -0.5
            parameter.copy_(center + scale * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(directory)
    return model.eval()
