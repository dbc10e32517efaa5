"""Tiny random HuggingFace models of each family, with sizes that nothing divides evenly."""

from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

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
    # The geometry of DeepSeek-R1-Distill-Qwen-1.5B but for vocabulary and depth: 12 heads in 2 groups, wide RoPE base.
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


def make_model(family: str, tied: bool, directory: Path, **changes: int) -> PreTrainedModel:
    """Write a random fp32 model to `directory` and return it in evaluation mode.

    Norm weights and biases are random too, so that a lost or misplaced one shows.
    """
    name, overrides = CONFIGS[family]
    config = getattr(transformers, name)(**(GEOMETRY | overrides | changes), tie_word_embeddings=tied)
    generator = torch.Generator().manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            center = 1.0 if "norm" in parameter_name else 0.0
            scale = 0.1 if parameter.dim() == 1 else parameter.shape[-1] ** -0.5
            parameter.copy_(center + scale * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(directory)
    return model.eval()
