"""Read the sizes of the vision tower that a config.json describes."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

# Fields that published models may leave out, with the value that all of them have.
_DEFAULTS = {"in_channels": 3, "spatial_merge_size": 2, "temporal_patch_size": 2}
_REQUIRED = ("depth", "hidden_size", "intermediate_size", "num_heads", "out_hidden_size", "patch_size")
_OTHER_NAMES = {"in_channels": "in_chans"}
_WINDOW_SIZE = 112  # of all published Qwen2.5-VL, as are these
_FULL_ATTENTION_LAYERS = (7, 15, 23, 31)
_KINDS: Mapping[str, Literal["qwen2_5_vl", "qwen3_vl"]] = {
    "qwen2_5_vl": "qwen2_5_vl",
    "qwen3_vl": "qwen3_vl",
    "qwen3_vl_moe": "qwen3_vl",
}


@dataclasses.dataclass(kw_only=True, slots=True, frozen=True)
class VisionFacts:
    """Sizes of a vision tower.

    `kind` is the architecture: Qwen2.5-VL's (RMSNorm, gated MLP, window attention; arXiv 2502.13923) or Qwen3-VL's
    (LayerNorm, plain MLP, learned positions, deepstack; arXiv 2511.21631).
    """

    kind: Literal["qwen2_5_vl", "qwen3_vl"]
    depth: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    out_hidden_size: int
    patch_size: int
    in_channels: int = 3
    spatial_merge_size: int = 2
    temporal_patch_size: int = 2
    num_position_embeddings: int = 0
    deepstack_features: int = 0
    window_size: int = 0
    """Pixels of the side of a window of attention; 0: every layer attends to whole images."""
    full_attention_layers: int = 0
    """Layers that attend to whole images where others attend to windows."""

    @property
    def patch_features(self) -> int:
        """Return the numbers in a patch: channels x frames x height x width."""
        return self.in_channels * self.temporal_patch_size * self.patch_size**2

    @property
    def patches_per_token(self) -> int:
        """Return the patches that are merged into one token of the language model."""
        return self.spatial_merge_size**2

    @property
    def merged_size(self) -> int:
        """Return the width of the concatenated patches of one token."""
        return self.hidden_size * self.patches_per_token


def vision_facts(family: str, vision: Mapping[str, Any]) -> VisionFacts | None:
    """Return the tower of `vision_config` in a config.json of `family`; None if unknown or incomplete."""
    kind = _KINDS.get(family.removesuffix("_text"))
    sizes: dict[str, int] = {}
    names = [*_REQUIRED, *_DEFAULTS, *(["num_position_embeddings"] if kind == "qwen3_vl" else [])]
    for name in names:
        value = vision.get(name, vision.get(_OTHER_NAMES.get(name, ""), _DEFAULTS.get(name)))
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            return None
        sizes[name] = value
    if kind is None:
        return None
    if kind == "qwen2_5_vl":
        window, full = vision.get("window_size", _WINDOW_SIZE), vision.get("fullatt_block_indexes")
        layers = full if isinstance(full, list) else _FULL_ATTENTION_LAYERS
        sizes["window_size"] = window if isinstance(window, int) and not isinstance(window, bool) else _WINDOW_SIZE
        sizes["full_attention_layers"] = len({layer for layer in layers if layer in range(sizes["depth"])})
        return VisionFacts(kind=kind, **sizes)
    deepstack = vision.get("deepstack_visual_indexes")
    return VisionFacts(kind=kind, deepstack_features=len(deepstack) if isinstance(deepstack, list) else 0, **sizes)
