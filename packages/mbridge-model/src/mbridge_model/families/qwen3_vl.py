"""Qwen3-VL: Qwen3's layer, deepstack, interleaved three-dimensional positions, timestamps between a video's frames."""

from mbridge_model.families.base import Family, Force
from mbridge_model.families.qwen3 import QK_NORM
from mbridge_model.vision import Vision, qwen3_tower

FORCES = (
    QK_NORM,
    Force(
        field="apply_rope_fusion",
        value=False,
        reason="the fused kernel cannot take the angles of Qwen3-VL, which interleave time, height and width",
    ),
)
VISION = Vision(
    tower="vision_model",
    projections=("merger", "decoder.deepstack_merger_list"),
    build_tower=qwen3_tower.build_tower,
    encode=qwen3_tower.encode,
    build_rotary=qwen3_tower.build_rotary,
    frames_are_runs=True,
)

FAMILY = Family(name="qwen3_vl", architectures=("Qwen3VLForConditionalGeneration",), forces=FORCES, vision=VISION)
