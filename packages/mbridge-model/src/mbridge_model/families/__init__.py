"""Model families: the provider fields that each one forces, and its vision part. All files have the same structure.

In: the name of a HuggingFace architecture. Out: its `Family`.

Uses: `errors`, `vision`.
"""

from mbridge_model.families import llama, mistral, qwen2, qwen2_5_vl, qwen3, qwen3_vl, qwen3_vl_moe
from mbridge_model.families.base import Family, Force

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


__all__ = ["FAMILIES", "GENERIC", "Family", "Force", "find_family"]
