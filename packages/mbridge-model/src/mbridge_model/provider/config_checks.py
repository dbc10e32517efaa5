"""Carry over, or refuse, settings of config.json that Megatron-Bridge silently drops: windows, rotary frequencies.

They change the logits and leave no trace in the weights, so `Bridge.check_coverage` cannot see them.
"""

from typing import Any

import torch
from torch import Tensor, nn

from mbridge_model.errors import ModelError

# Megatron's field of each of YaRN's parameters, its key in config.json, and the paper's value (Peng et al. 2023).
_YARN = {
    "yarn_rotary_scaling_factor": ("factor", None),
    "yarn_original_max_position_embeddings": ("original_max_position_embeddings", None),
    "yarn_beta_fast": ("beta_fast", 32.0),
    "yarn_beta_slow": ("beta_slow", 1.0),
    "yarn_mscale": ("mscale", 1.0),
    "yarn_mscale_all_dim": ("mscale_all_dim", 0.0),
    "yarn_correction_range_round_to_int": ("truncate", True),
}


def config_fields(hf_config: Any, provider: Any) -> dict[str, Any]:
    """Return provider fields that follow from `hf_config` (a transformers configuration) and that `provider` lacks."""
    return _window_fields(hf_config, provider) | _yarn_fields(hf_config, provider) | _mrope_fields(hf_config, provider)


def _window_fields(hf_config: Any, provider: Any) -> dict[str, Any]:
    """HuggingFace's window counts the query's own position; Megatron's counts the positions left of it."""
    window = getattr(hf_config, "sliding_window", None)
    layer_types = getattr(hf_config, "layer_types", None)
    if provider.window_size is not None or window is None or not layer_types:
        return {}
    slides = [int(layer_type == "sliding_attention") for layer_type in layer_types]
    return {"window_size": (window - 1, 0), "window_attn_skip_freq": slides} if any(slides) else {}


def _yarn_fields(hf_config: Any, provider: Any) -> dict[str, Any]:
    """Of Mistral's provider Megatron-Bridge sets none of them, of others those that config.json has."""
    parameters = getattr(hf_config, "rope_parameters", None) or {}
    if parameters.get("rope_type") != "yarn" or not hasattr(provider, "yarn_rotary_scaling_factor"):
        return {}
    values = {field: parameters.get(key, default) for field, (key, default) in _YARN.items()}
    return {"position_embedding_type": "yarn"} | values


def _mrope_fields(hf_config: Any, provider: Any) -> dict[str, Any]:
    """How many frequencies turn with time, height and width. Of Qwen2.5-VL Megatron-Bridge assumes [16, 24, 24]."""
    section = (getattr(hf_config, "rope_parameters", None) or {}).get("mrope_section")
    if provider.position_embedding_type != "mrope" or section is None:
        return {}
    return {"mrope_section": list(section)}


def check_mrope(text_config: Any) -> None:
    """Check the settings of three-dimensional positions, for which Megatron-Core has unscaled frequencies only.

    Raises:
        ModelError: config.json asks for scaled ones, or its sections do not add up to all of them.
    """
    parameters = text_config.rope_parameters
    if parameters["rope_type"] != "default":
        raise ModelError(
            f"config.json has rope_type {parameters['rope_type']!r} in {parameters}; Megatron-Core scales no rotary "
            "embedding of three dimensions, and the model would compute something else"
        )
    channels = getattr(text_config, "head_dim", None) or text_config.hidden_size // text_config.num_attention_heads
    section = parameters.get("mrope_section")
    if section is not None and sum(section) != channels // 2:
        raise ModelError(
            f"config.json has mrope_section {list(section)}, which adds up to {sum(section)}; heads of {channels} "
            f"channels have {channels // 2} frequencies"
        )


def check_rotary(hf_config: Any, model: list[nn.Module]) -> None:
    """Raise `ModelError` if the built model's rotary angles or their scale differ from those of transformers.

    Only text models with one set of frequencies are compared; others have their own embeddings, and pass.
    """
    from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
    from megatron.core.utils import unwrap_model

    parameters = getattr(hf_config, "rope_parameters", None)
    rotary = getattr(unwrap_model(model[0]), "rotary_pos_emb", None)
    if not parameters or parameters.get("rope_theta") is None or not isinstance(rotary, RotaryEmbedding):
        return
    expected, expected_scale = _hf_frequencies(hf_config)
    result = rotary(2)
    angles, scale = result if isinstance(result, tuple) else (result, 1.0)
    # At position 1 the angles are the frequencies, each of them twice.
    frequencies = angles[1].flatten()[: len(expected)].cpu()
    if 2 * len(expected) != angles.shape[-1] or not (
        torch.allclose(frequencies, expected, rtol=1e-5, atol=0) and abs(scale - expected_scale) < 1e-6
    ):
        raise ModelError(
            f"Megatron-Core's rotary embedding differs from what config.json says in rope_parameters {parameters}: it "
            "has no such variant, and the model would compute something else"
        )


def limit_dynamic_rotary(hf_config: Any, model: list[nn.Module]) -> None:
    """Make a model of dynamic RoPE refuse sequences beyond `max_position_embeddings`.

    Beyond, its frequencies depend on the length of the batch, so that sampling and training compute different things.
    """
    from megatron.core.utils import unwrap_model

    parameters = getattr(hf_config, "rope_parameters", None) or {}
    if parameters.get("rope_type") != "dynamic":
        return
    limit = hf_config.max_position_embeddings

    def check(module: nn.Module, arguments: tuple[Any, ...]) -> None:
        if arguments[0] > limit:
            raise ModelError(
                f"a sequence has {arguments[0]} tokens, and config.json has rope_type 'dynamic' and "
                f"max_position_embeddings {limit}, beyond which the frequencies depend on the length of the batch; "
                f"shorten sequences to {limit}, or use rope_type 'yarn' or 'linear'"
            )

    for chunk in unwrap_model(model):
        if (rotary := getattr(chunk, "rotary_pos_emb", None)) is not None:
            rotary.register_forward_pre_hook(check)


def _hf_frequencies(hf_config: Any) -> tuple[Tensor, float]:
    """Frequencies [rotary channels / 2], radians per position, and the scale of sine and cosine."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    parameters = hf_config.rope_parameters
    rope_type = parameters["rope_type"]
    if rope_type != "default":
        if rope_type not in ROPE_INIT_FUNCTIONS:
            raise ModelError(f"config.json has rope_type {rope_type!r}, which transformers does not know")
        frequencies, scale = ROPE_INIT_FUNCTIONS[rope_type](hf_config, torch.device("cpu"))
        return frequencies, float(scale)
    channels = getattr(hf_config, "head_dim", None) or hf_config.hidden_size // hf_config.num_attention_heads
    channels = int(channels * (parameters.get("partial_rotary_factor") or 1.0))
    exponents = torch.arange(0, channels, 2, dtype=torch.int64).float() / channels
    return 1.0 / parameters["rope_theta"] ** exponents, 1.0
