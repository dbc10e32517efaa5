"""Self-attention in which one kernel splits the fused projection and rotates queries and keys."""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.spec_utils import ModuleSpec
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from mbridge_model.kernels import runs_kernels

_of_each_token = WeakTensorKeyDictionary()
"""By the boundaries of a packed batch: the angles of all positions, and those of each token, which layers share."""


class RotarySelfAttention(SelfAttention):
    """Megatron-Core's self-attention, with the kernel on GPUs, and unchanged where the kernel does not apply.

    The kernel does not support a norm of queries and keys between the split and the rotation, rotation of only some
    channels or of adjacent pairs, gates, fewer groups of heads than tensor-parallel ranks, context parallelism,
    inference with a cache, or a machine without a C compiler.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        config = self.config
        self._has_kernel = not (
            self.q_layernorm is not None
            or self.k_layernorm is not None
            or config.rotary_interleaved
            or config.no_rope_freq
            or config.attention_output_gate
            or config.fused_single_qkv_rope
            or config.test_mode
            or self.pg_collection.cp.size() > 1
            or self.num_query_groups_per_partition * self.world_size != config.num_query_groups
        )
        self._rotation: tuple[Tensor, Tensor | None] | None = None
        """While `forward` runs: the angles, and the boundaries of packed sequences."""

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        *,
        rotary_pos_emb: Any = None,
        packed_seq_params: PackedSeqParams | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """As Megatron-Core's. `rotary_pos_emb`: float32 [positions, 1, 1, channels]."""
        if (
            self._has_kernel
            and runs_kernels(hidden_states)
            and isinstance(rotary_pos_emb, Tensor)
            and rotary_pos_emb.shape[1:] == (1, 1, self.hidden_size_per_attention_head)
            and kwargs.get("inference_context") is None
        ):
            self._rotation, rotary_pos_emb = (rotary_pos_emb, _boundaries(packed_seq_params)), None
        kwargs |= {"rotary_pos_emb": rotary_pos_emb, "packed_seq_params": packed_seq_params}
        try:
            output: tuple[Tensor, Tensor | None] = super().forward(hidden_states, attention_mask, **kwargs)
        finally:
            self._rotation = None
        return output

    def get_query_key_value_tensors(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Queries, keys and values, [sequence, batch, heads, channels] each; rotated where the kernel serves."""
        if self._rotation is None:
            return super().get_query_key_value_tensors(hidden_states, *args, **kwargs)
        from mbridge_model.kernels.rotary import SplitAndRotate

        # Transformer Engine's layer adds its bias within the matrix product.
        project: Any = getattr(self.linear_qkv, "without_bias", self.linear_qkv)
        fused, bias = project(hidden_states)
        angles, boundaries = self._rotation
        if boundaries is not None:
            angles = gathered_angles(boundaries, angles, len(fused))
        groups = self.num_query_groups_per_partition
        queries = self.num_attention_heads_per_partition // groups
        return SplitAndRotate.apply(fused, bias, angles, groups, queries, self._yarn_concentration_factor)


def _boundaries(packing: PackedSeqParams | None) -> Tensor | None:
    """Return the boundaries of the packed sequences' slots, padding included."""
    if packing is None or packing.qkv_format != "thd":
        return None
    return packing.cu_seqlens_q if packing.cu_seqlens_q_padded is None else packing.cu_seqlens_q_padded


def gathered_angles(cu_seqlens: Tensor, freqs: Tensor, tokens: int) -> Tensor:
    """Return the angles of each token [tokens, 1, 1, channels], given those of each position and the boundaries."""
    known, gathered = _of_each_token.get(cu_seqlens, (None, None))
    if known is not freqs:
        gathered = freqs[packed_positions(cu_seqlens, tokens)]
        _of_each_token[cu_seqlens] = freqs, gathered
    return gathered


def packed_positions(cu_seqlens: Tensor, tokens: int) -> Tensor:
    """Return each token's position in its own sequence, int64 [tokens]; `cu_seqlens` [sequences + 1] are boundaries."""
    index = torch.arange(tokens, device=cu_seqlens.device)
    sequence = torch.searchsorted(cu_seqlens, index, right=True) - 1
    return index - cu_seqlens[sequence]


def rotary_layers(backend_spec: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a provider's `transformer_layer_spec`: this attention replaces Megatron-Core's."""

    def layers_with_rotary_attention(config: Any, vp_stage: int | None = None) -> Any:
        spec, layers = layer_specs(backend_spec, config, vp_stage)
        for layer in layers:
            # Transformer Engine's own whole layers have no parts.
            attention = getattr(layer.submodules, "self_attention", None)
            if attention is not None and attention.module is SelfAttention:
                attention.module = RotarySelfAttention
        return spec

    return layers_with_rotary_attention


def layer_specs(backend_spec: Callable[..., Any], config: Any, vp_stage: int | None) -> tuple[Any, list[ModuleSpec]]:
    """Return the stage's specification by a provider's `transformer_layer_spec`, and its layers' specifications."""
    takes_stage = "vp_stage" in inspect.signature(backend_spec).parameters
    spec = backend_spec(config, vp_stage=vp_stage) if takes_stage else backend_spec(config)
    return spec, [spec] if isinstance(spec, ModuleSpec) else spec.layer_specs
