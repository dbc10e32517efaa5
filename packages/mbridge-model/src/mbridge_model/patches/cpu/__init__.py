"""Megatron-Core on a machine without a GPU, and Megatron-Bridge without Transformer Engine.

`enable_cpu()` makes every hard-coded use of CUDA on Megatron-Core's training paths resolve to the CPU, and does nothing
where there is a GPU. `allow_missing_transformer_engine()` lets megatron.bridge be imported where Transformer Engine is
not installed, with or without a GPU.
"""

from mbridge_model.patches.cpu.cpu_patches import CPU, enable_cpu
from mbridge_model.patches.cpu.missing_transformer_engine import (
    MissingTransformerEngineError,
    allow_missing_transformer_engine,
)

__all__ = ["CPU", "MissingTransformerEngineError", "allow_missing_transformer_engine", "enable_cpu"]
