"""Qwen2.5-VL's vision tower: transformers' own module, a whole copy on each tensor-parallel rank.

Its index arithmetic runs on the host and its attention over all windows or images at once: transformers' runs once for
each of them, and there are hundreds of windows in a batch.
"""

from contextlib import nullcontext
from types import MethodType
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mbridge_model.vision.packing import pack_frames, pack_segments


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
    if provider.recompute_granularity == "full":
        tower.gradient_checkpointing_enable({"use_reentrant": False})
    keep_frequencies_in_fp32(tower)
    attend_to_all_at_once(tower)
    return tower


def encode(tower: Any, pixel_values: Tensor, grid_thw: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Features [tokens, hidden]; there is no deepstack."""
    from transformers.vision_utils import get_vision_position_ids, get_vision_window_index

    device = pixel_values.device
    window_index, window_ends = get_vision_window_index(
        grid_thw, tower.spatial_merge_size, window_size=tower.window_size, patch_size=tower.patch_size
    )
    output = tower(
        pixel_values,
        grid_thw=grid_thw,
        position_ids=get_vision_position_ids(grid_thw, tower.spatial_merge_size).to(device),
        window_index=window_index.to(device),
        # What a block's attention gets as `cu_seqlens` is for `_attend` to read.
        cu_seqlens=pack_frames(grid_thw, device),
        cu_window_seqlens=pack_segments(window_ends.diff(), device),
        return_dict=True,
    )
    return output.pooler_output, []


def keep_frequencies_in_fp32(tower: Any) -> None:
    """Take the rotary frequencies out of the buffers, which a half-precision model would round to its dtype."""
    rotary = tower.rotary_pos_emb
    frequencies = rotary.inv_freq.float().to(torch.cuda.current_device())
    del rotary.inv_freq
    rotary.inv_freq = frequencies


def attend_to_all_at_once(tower: Any) -> None:
    """Give each block's attention the packed attention of the torch backend."""
    from megatron.core.transformer.enums import AttnMaskType
    from megatron.core.transformer.transformer_config import TransformerConfig

    from mbridge_model.torch_backend import TorchDotProductAttention

    settings = tower.config
    config = TransformerConfig(
        num_layers=settings.depth, hidden_size=settings.hidden_size, num_attention_heads=settings.num_heads
    )
    core = TorchDotProductAttention(config, 1, AttnMaskType.no_mask, "self", attention_dropout=0.0)
    for block in tower.blocks:
        block.attn.core = core
        block.attn.forward = MethodType(_attend, block.attn)


def _attend(
    attention: Any, hidden_states: Tensor, cu_seqlens: Any, position_embeddings: tuple[Tensor, Tensor], **unused: Any
) -> Tensor:
    """[patches, hidden] in and out; `cu_seqlens` is the `PackedSeqParams` of windows or frames."""
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import apply_rotary_pos_emb_vision

    projected = attention.qkv(hidden_states).unflatten(-1, (3, attention.num_heads, attention.head_dim))
    query, key, value = projected.unbind(1)
    query, key = apply_rotary_pos_emb_vision(query, key, *position_embeddings)
    return attention.proj(attention.core(query, key, value, None, packed_seq_params=cu_seqlens))
