"""The description of a family's vision part."""

from collections.abc import Callable
from dataclasses import dataclass
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
