"""Core attention on `scaled_dot_product_attention`: grouped queries, dense and packed (THD) batches.

Packed sequences go to torch's variable-length flash kernel on a GPU in half precision; elsewhere sequences of similar
length are padded into one dense call (see `_length_buckets`).
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import is_layer_window_attention
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from mbridge_model.kernels.attention import cudnn_attention_first, no_cudnn_attention


class TorchDotProductAttention(MegatronModule):
    """softmax(Q Kᵀ · scale) V over the heads of this tensor-parallel rank, without parameters.

    Raises:
        ValueError: a feature of `config` that this backend does not have (context parallelism, attention sinks).
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        super().__init__(config=config)
        if config.context_parallel_size > 1:
            raise ValueError("context_parallel_size > 1 is not built in the torch backend; use backend 'te' on a GPU")
        if config.softmax_type != "vanilla":
            raise ValueError(f"softmax_type {config.softmax_type!r} is not built in the torch backend")
        self.attn_mask_type = attn_mask_type
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        self.scale = config.kv_channels**-0.5 if softmax_scale is None else softmax_scale
        if config.apply_query_key_layer_scaling:
            self.scale /= max(1, layer_number)
        has_window = is_layer_window_attention(config.window_size, config.window_attn_skip_freq, layer_number)
        self.window = config.window_size if has_window else None

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """Attend.

        Args:
            query: dense [sequence, batch, heads, channels]; packed [tokens, heads, channels].
            key, value: as `query`, with the number of key/value groups in place of the heads.
            attention_mask: bool, broadcastable to [batch, heads, query, key], True where attention is forbidden
                (Megatron's convention). It adds to the causal mask.
            packed_seq_params: with `qkv_format == "thd"`, the boundaries of the packed sequences. Where
                `cu_seqlens_q_padded` is given, sequence i occupies its slots and `cu_seqlens_q` its true length;
                outputs of the padding slots are undefined.

        Returns:
            Dense [sequence, batch, heads * channels]; packed [tokens, heads * channels].
        """
        if attention_bias is not None:
            raise ValueError("attention_bias is not built in the torch backend")
        mask_type = attn_mask_type or self.attn_mask_type
        is_causal = mask_type in (AttnMaskType.causal, AttnMaskType.padding_causal)
        if packed_seq_params is not None and packed_seq_params.qkv_format == "thd":
            return self._packed(query, key, value, packed_seq_params, is_causal).flatten(-2)
        # [sequence, batch, heads, channels] -> [batch, heads, sequence, channels]
        query, key, value = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))
        return self._attend(query, key, value, attention_mask, is_causal).permute(2, 0, 1, 3).flatten(-2)

    def _attend(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, is_causal: bool
    ) -> Tensor:
        """[batch, heads, sequence, channels] each. Only the pure causal case goes without a mask tensor."""
        allowed = None if attention_mask is None else ~attention_mask
        if self.window is not None or (allowed is not None and is_causal):
            banded = _band(query.shape[2], key.shape[2], is_causal, self.window, query.device)
            allowed = banded if allowed is None else allowed & banded
        dropout = self.dropout if self.training else 0.0
        # Ranks hold different heads, so they must draw different dropout masks: Megatron's model-parallel stream.
        with _kernels(query, has_mask=allowed is not None), get_cuda_rng_tracker().fork() if dropout else nullcontext():
            return scaled_dot_product_attention(
                query,
                key,
                value,
                attn_mask=allowed,
                dropout_p=dropout,
                is_causal=is_causal and allowed is None,
                scale=self.scale,
                enable_gqa=query.shape[1] != key.shape[1],
            )

    def _packed(self, query: Tensor, key: Tensor, value: Tensor, packing: PackedSeqParams, is_causal: bool) -> Tensor:
        """[tokens, heads, channels] in and out."""
        is_dense = packing.cu_seqlens_q_padded is None
        padded = packing.cu_seqlens_q if is_dense else packing.cu_seqlens_q_padded
        has_kernel = query.is_cuda and query.dtype != torch.float32 and self.window is None
        if has_kernel and (is_causal or is_dense) and not (self.dropout and self.training):
            # Under a causal mask, padding behind a sequence is seen by no real token, so the slots serve as lengths.
            from torch.nn.attention.varlen import varlen_attn

            groups = query.shape[1] // key.shape[1]
            if groups > 1:
                key, value = (tensor.repeat_interleave(groups, dim=1) for tensor in (key, value))
            longest = packing.max_seqlen_q
            window = (-1, 0 if is_causal else -1)
            context = varlen_attn(
                query, key, value, padded, padded, longest, longest, scale=self.scale, window_size=window
            )
            assert isinstance(context, Tensor)  # a pair only where the log-sum-exp is asked for
            return context
        starts = padded[:-1].tolist()
        lengths = packing.cu_seqlens_q.diff().tolist()
        output = torch.zeros(query.shape[0], query.shape[1], value.shape[2], dtype=query.dtype, device=query.device)
        for bucket in _length_buckets(lengths):
            longest = max(lengths[index] for index in bucket)
            slots = torch.tensor([starts[index] for index in bucket]).unsqueeze(1) + torch.arange(longest)
            real = torch.arange(longest) < torch.tensor([lengths[index] for index in bucket]).unsqueeze(1)
            # Padding reads slot 0; under the causal mask no real token sees it, and its output is dropped.
            slots, real = slots.where(real, 0).to(query.device), real.to(query.device)
            query_rows, key_rows, value_rows = (tensor[slots].transpose(1, 2) for tensor in (query, key, value))
            mask = None if is_causal else ~real[:, None, None, :]
            context = self._attend(query_rows, key_rows, value_rows, mask, is_causal).transpose(1, 2)
            output = output.index_put((slots[real],), context[real])
        return output


def _kernels(query: Tensor, *, has_mask: bool) -> AbstractContextManager[Any]:
    """Prefer cuDNN's attention where it pays and exclude it elsewhere, except under a mask, which flash lacks."""
    if not query.is_cuda or has_mask:
        return nullcontext()
    if torch.cuda.get_device_capability(query.device) >= (9, 0) and cudnn_pays(query.shape[2]):
        return cudnn_attention_first()
    return no_cudnn_attention()


def cudnn_pays(length: int) -> bool:
    """Return whether cuDNN's attention is faster for sequences of this length, and the length is likely to recur.

    On an H100 it is nearly twice as fast as flash at 4,096 tokens, below 2,048 slower. Batches padded to whatever their
    longest sample is would each need a plan.
    """
    return length >= 4096 and length % 128 == 0


def _length_buckets(lengths: list[int]) -> list[list[int]]:
    """Return the indices of the non-empty sequences, grouped by length up to the next power of two.

    Padding a group to its longest member wastes less than half of the slots, and there are few groups.
    """
    buckets: dict[int, list[int]] = {}
    for index, length in enumerate(lengths):
        if length:
            buckets.setdefault((length - 1).bit_length(), []).append(index)
    return list(buckets.values())


def _band(queries: int, keys: int, is_causal: bool, window: tuple[int, int] | None, device: torch.device) -> Tensor:
    """Bool [queries, keys], True where a query may attend: causal, within (left, right) of itself; -1 is no limit."""
    distance = torch.arange(queries, device=device).unsqueeze(1) + (keys - queries) - torch.arange(keys, device=device)
    allowed = distance >= 0 if is_causal else torch.ones_like(distance, dtype=torch.bool)
    if window is not None:
        left, right = window
        if left >= 0:
            allowed &= distance <= left
        if right >= 0:
            allowed &= -distance <= right
    return allowed
