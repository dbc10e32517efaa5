"""Megatron-Core layers in plain torch, under Transformer Engine's parameter names.

In: a Megatron configuration. Out: the specification of its layers. Since every parameter has Transformer Engine's name
and shape, checkpoints load in its runs and vice versa, and Megatron-Bridge's weight mappings apply unchanged.

Uses: `kernels`.
"""

from mbridge_model.torch_backend.attention import TorchDotProductAttention
from mbridge_model.torch_backend.specification import TorchSpecProvider, layer_spec, torch_block_spec

__all__ = ["TorchDotProductAttention", "TorchSpecProvider", "layer_spec", "torch_block_spec"]
