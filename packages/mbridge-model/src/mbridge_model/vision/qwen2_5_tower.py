"""Qwen2.5-VL's vision tower: transformers' own module, replicated on each tensor-parallel rank.

Its index arithmetic runs on the host, and one attention call covers all windows or images: transformers attends to one
at a time, and a batch has hundreds of windows.
"""

from contextlib import nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mbridge_model.vision.packing import pack_frames, pack_segments


def build_tower(provider: Any, backend: Literal["te", "torch"]) -> nn.Module:
    """Build the tower of `provider.vision_config` in the model's dtype, the same for both backends."""
    from megatron.core.transformer.enums import AttnMaskType
    from megatron.core.transformer.transformer_config import TransformerConfig
    from transformers.initialization import no_init_weights
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel

    from mbridge_model.torch_backend import TorchDotProductAttention

    # Random weights must be the same on all tensor-parallel ranks.
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        with nullcontext() if provider.perform_initialization else no_init_weights():
            tower = Qwen2_5_VisionTransformerPretrainedModel._from_config(
                provider.vision_config, dtype=provider.params_dtype
            )
    if provider.recompute_granularity == "full":
        tower.gradient_checkpointing_enable({"use_reentrant": False})
    tower.rotary_pos_emb = RotaryAngles(tower.rotary_pos_emb.inv_freq.float().to(torch.cuda.current_device()))
    settings = tower.config
    config = TransformerConfig(
        num_layers=settings.depth, hidden_size=settings.hidden_size, num_attention_heads=settings.num_heads
    )
    core = TorchDotProductAttention(config, 1, AttnMaskType.no_mask, "self", attention_dropout=0.0)
    for block in tower.blocks:
        block.attn = PackedAttention(block.attn, core)
    return tower


def encode(tower: Any, pixel_values: Tensor, grid_thw: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Return the features [tokens, hidden]; there is no deepstack."""
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
        # A block passes them on to its `PackedAttention` as `cu_seqlens`.
        cu_seqlens=pack_frames(grid_thw, device),
        cu_window_seqlens=pack_segments(window_ends.diff(), device),
        return_dict=True,
    )
    return output.pooler_output, []


class RotaryAngles(nn.Module):
    """transformers' rotary embedding with frequencies in fp32; as its buffer they would take the model's dtype."""

    def __init__(self, frequencies: Tensor) -> None:
        super().__init__()
        self.frequencies = frequencies

    def forward(self, position_ids: Tensor) -> Tensor:
        """int64 [patches, row and column] in; radians [patches, 2 * frequencies] out."""
        return (position_ids.unsqueeze(-1) * self.frequencies).flatten(1)


class PackedAttention(nn.Module):
    """transformers' attention, with its parameters, over all windows or images at once, which `core` keeps apart."""

    def __init__(self, attention: Any, core: nn.Module) -> None:
        super().__init__()
        self.qkv, self.proj, self.core = attention.qkv, attention.proj, core
        self.num_heads = attention.num_heads

    def forward(
        self, hidden_states: Tensor, cu_seqlens: Any, position_embeddings: tuple[Tensor, Tensor], **unused: Any
    ) -> Tensor:
        """[patches, hidden] in and out; `cu_seqlens` is the `PackedSeqParams` of windows or frames."""
        from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import apply_rotary_pos_emb_vision

        query, key, value = self.qkv(hidden_states).unflatten(-1, (3, self.num_heads, -1)).unbind(1)
        query, key = apply_rotary_pos_emb_vision(query, key, *position_embeddings)
        output: Tensor = self.proj(self.core(query, key, value, None, packed_seq_params=cu_seqlens))
        return output
