"""Llama and the models that share its architecture (SmolLM2, TinyLlama, ...): RMSNorm, RoPE, SwiGLU, no biases."""

from mbridge_model.families.base import Family

FAMILY = Family(name="llama", architectures=("LlamaForCausalLM",), forces=())
