"""Qwen3-VL with a mixture of experts in each language layer."""

from mbridge_model.families.base import Family
from mbridge_model.families.qwen3_vl import FORCES, VISION

FAMILY = Family(
    name="qwen3_vl_moe", architectures=("Qwen3VLMoeForConditionalGeneration",), forces=FORCES, vision=VISION
)
