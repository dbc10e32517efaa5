"""Megatron-Core layers in plain torch, under Transformer Engine's parameter names.

A checkpoint of this backend loads in a Transformer Engine run and the other way round, and Megatron-Bridge's weight
mappings apply unchanged, because every parameter has the name and the shape that Transformer Engine's layer gives it.
"""

from mbridge_model.torch_backend.attention import TorchDotProductAttention
from mbridge_model.torch_backend.specification import TorchSpecProvider, torch_block_spec

__all__ = ["TorchDotProductAttention", "TorchSpecProvider", "torch_block_spec"]
