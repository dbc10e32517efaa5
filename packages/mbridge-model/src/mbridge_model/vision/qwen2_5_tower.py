"""Qwen2.5-VL's vision tower: transformers' own module, a whole copy on each tensor-parallel rank."""

from contextlib import nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn


def build_tower(provider: Any, backend: Literal["te", "torch"]) -> nn.Module:
    """The tower of `provider.vision_config` in the model's dtype; the backend makes no difference."""
    from transformers.initialization import no_init_weights
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel

    # Random weights must be the same on all tensor-parallel ranks.
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        with nullcontext() if provider.perform_initialization else no_init_weights():
            tower = Qwen2_5_VisionTransformerPretrainedModel._from_config(
                provider.vision_config, dtype=provider.params_dtype
            )
    keep_frequencies_in_fp32(tower)
    return tower


def keep_frequencies_in_fp32(tower: Any) -> None:
    """Take the rotary frequencies out of the buffers, which a half-precision model would round to its dtype."""
    rotary = tower.rotary_pos_emb
    frequencies = rotary.inv_freq.float().to(torch.cuda.current_device())
    del rotary.inv_freq
    rotary.inv_freq = frequencies


def encode(tower: nn.Module, pixel_values: Tensor, grid_thw: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Features [tokens, hidden]; there is no deepstack."""
    return tower(pixel_values, grid_thw=grid_thw, return_dict=True).pooler_output, []
