"""Mistral: Llama's layer, in some versions with a sliding attention window or YaRN."""

from mbridge_model.families.base import Family

FAMILY = Family(name="mistral", architectures=("MistralForCausalLM",), forces=())
