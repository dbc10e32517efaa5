"""Megatron-Core layers in plain torch, under Transformer Engine's parameter names.

In: a Megatron configuration. Out: the specification of its layers. A checkpoint of this backend loads in a Transformer
Engine run and vice versa, and Megatron-Bridge's weight mappings apply unchanged, because every parameter has the name
and the shape that Transformer Engine's layer gives it.

Uses: `kernels`.
"""

from mbridge_model.torch_backend.attention import TorchDotProductAttention
from mbridge_model.torch_backend.specification import TorchSpecProvider, layer_spec, torch_block_spec

__all__ = ["TorchDotProductAttention", "TorchSpecProvider", "layer_spec", "torch_block_spec"]
