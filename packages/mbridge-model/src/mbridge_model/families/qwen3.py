"""Qwen3: no biases on Q, K, V, but an RMSNorm over each head's queries and keys."""

from mbridge_model.families.base import Family, Force

QK_NORM = Force(
    field="qk_layernorm",
    value=True,
    reason="Qwen3 checkpoints hold q_norm and k_norm, and config.json does not say so",
)

FAMILY = Family(name="qwen3", architectures=("Qwen3ForCausalLM",), forces=(QK_NORM,))
