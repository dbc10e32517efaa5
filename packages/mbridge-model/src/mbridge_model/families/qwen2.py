"""Qwen2, Qwen2.5 and what was distilled into them (DeepSeek-R1-Distill-Qwen): Llama's layer, biases on Q, K, V."""

from mbridge_model.families.base import Family, Force

QKV_BIAS = Force(
    field="add_qkv_bias",
    value=True,
    reason="Qwen2 checkpoints hold q_proj, k_proj and v_proj biases, and config.json does not say so",
)

FAMILY = Family(name="qwen2", architectures=("Qwen2ForCausalLM",), forces=(QKV_BIAS,))
