"""Qwen2.5-VL: Qwen2's layer, a vision tower with window attention, videos timed by their positions."""

from mbridge_model.families.base import Family, Force
from mbridge_model.families.qwen2 import QKV_BIAS
from mbridge_model.vision import Vision, qwen2_5_tower

FAMILY = Family(
    name="qwen2_5_vl",
    architectures=("Qwen2_5_VLForConditionalGeneration",),
    forces=(
        QKV_BIAS,
        Force(
            field="apply_rope_fusion",
            value=False,
            reason="the fused kernel would count the positions of each packed sequence from 0, in one dimension",
        ),
    ),
    vision=Vision(
        tower="visual",
        projections=("merger",),
        build_tower=qwen2_5_tower.build_tower,
        encode=qwen2_5_tower.encode,
        build_rotary=None,
        frames_are_runs=False,
    ),
)
