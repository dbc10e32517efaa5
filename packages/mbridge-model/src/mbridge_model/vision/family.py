"""The description of a family's vision part, and of the parts of a model that are frozen."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal

from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True, slots=True)
class Vision:
    """How a family processes images and videos.

    Attributes:
        tower: name of the vision tower in Megatron-Bridge's parameter names.
        projections: modules of the tower that map its features into the language model; the rest is the tower proper.
        build_tower: builds the tower on the first pipeline stage, from the Megatron provider and the backend.
        encode: runs the tower: (tower, pixel_values [patches, features], grid_thw [items, 3]) to the features that
            replace the placeholders' embeddings, [tokens, hidden], and those added after the first language layers.
        build_rotary: replaces the rotary embedding that Megatron-Core's `mrope` gives the language model, or None.
        frames_are_runs: whether text separates the frames of a video, each of which is a run of placeholders.
    """

    tower: str
    projections: tuple[str, ...]
    build_tower: Callable[[Any, Literal["te", "torch"]], nn.Module]
    encode: Callable[[nn.Module, Tensor, Tensor], tuple[Tensor, list[Tensor]]]
    build_rotary: Callable[[Any], nn.Module] | None
    frames_are_runs: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Freeze:
    """The parts whose weights are not trained: none by default, where Megatron-Bridge freezes two of Qwen3-VL-MoE's.

    Attributes:
        language_model: embeddings, layers and output layer.
        vision_model: the vision tower without its projection.
        vision_projection: the modules that map the tower's features into the language model (Qwen's mergers).
    """

    language_model: bool = False
    vision_model: bool = False
    vision_projection: bool = False

    def fields(self) -> dict[str, bool]:
        """Return the fields of a Megatron-Bridge provider."""
        return {f"freeze_{part}": is_frozen for part, is_frozen in asdict(self).items()}
