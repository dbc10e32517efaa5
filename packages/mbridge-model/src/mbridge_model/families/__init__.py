"""Model families: the provider fields that each one forces, and its vision part. All files have the same structure.

In: config.json. Out: the `Family` of its architecture, or a refusal of one that cannot be built.

Uses: `errors`, `vision`.
"""

from collections.abc import Mapping
from typing import Any

from mbridge_model.errors import ModelError
from mbridge_model.families import llama, mistral, qwen2, qwen2_5_vl, qwen3, qwen3_vl, qwen3_vl_moe
from mbridge_model.families.base import Family, Force

__all__ = ["FAMILIES", "GENERIC", "TORCH_ARCHITECTURES", "Family", "Force", "check_architecture", "find_family"]

FAMILIES: tuple[Family, ...] = tuple(
    module.FAMILY for module in (llama, mistral, qwen2, qwen3, qwen2_5_vl, qwen3_vl, qwen3_vl_moe)
)

# Other architectures are handled the same way, with nothing forced. Those named here agree with transformers.
GENERIC = Family(
    name="generic", architectures=("GemmaForCausalLM", "NemotronForCausalLM", "Qwen3MoeForCausalLM"), forces=()
)


def find_family(architecture: str) -> Family:
    """Return the family of a HuggingFace model class name, or `GENERIC` for one that needs no rule."""
    return next((family for family in FAMILIES if architecture in family.architectures), GENERIC)


TORCH_ARCHITECTURES = frozenset(name for family in (*FAMILIES, GENERIC) for name in family.architectures)
"""HuggingFace model classes that are built with plain torch layers and agree with transformers."""

# Megatron-Bridge builds experts in every layer of these.
_ALL_LAYERS_HAVE_EXPERTS = ("Qwen3MoeForCausalLM", "Qwen3VLMoeForConditionalGeneration")
# The others have no place for the bias of the output projection, nor has any for those of the MLP.
_QKV_BIAS = ("Qwen2ForCausalLM", "Qwen2_5_VLForConditionalGeneration")


def check_architecture(config: Mapping[str, Any], backend: str) -> None:
    """Check that the model of `config`, the content of a config.json, can be built with the layers of `backend`.

    Raises:
        ModelError: it has no plain torch layers, or biases or layers without experts that Megatron-Bridge does not
            know.
    """
    architecture = config["architectures"][0]
    if backend == "torch" and architecture not in TORCH_ARCHITECTURES:
        raise ModelError(
            f"config.json names {architecture}, which is not built with plain torch layers; use backend 'te' on a GPU "
            f"with Transformer Engine, or a model of {', '.join(sorted(TORCH_ARCHITECTURES))}"
        )
    text = config.get("text_config", config)
    for key in ("attention_bias", "mlp_bias"):
        known = architecture not in TORCH_ARCHITECTURES or (key == "attention_bias" and architecture in _QKV_BIAS)
        if text.get(key) and not known:
            raise ModelError(
                f"config.json has {key} {text[key]}, and Megatron-Bridge builds {architecture} without these biases: "
                f"use a model without {key}"
            )
    if architecture in _ALL_LAYERS_HAVE_EXPERTS:
        for key, usual in (("mlp_only_layers", []), ("decoder_sparse_step", 1)):
            if text.get(key) not in (None, usual):
                raise ModelError(
                    f"config.json has {key} {text[key]}, so some layers of this {architecture} have no experts; "
                    f"Megatron-Bridge builds experts in every layer: use a model without {key}"
                )
