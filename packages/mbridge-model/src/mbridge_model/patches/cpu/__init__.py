"""Megatron-Core on a machine without a GPU, and Megatron-Bridge without Transformer Engine."""

from mbridge_model.patches.cpu.cpu_patches import CPU, enable_cpu
from mbridge_model.patches.cpu.missing_transformer_engine import (
    MissingTransformerEngineError,
    allow_missing_transformer_engine,
)

__all__ = ["CPU", "MissingTransformerEngineError", "allow_missing_transformer_engine", "enable_cpu"]
