"""The images and videos of a micro-batch."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from mbridge_model.errors import ModelError


@dataclass(frozen=True, kw_only=True, slots=True)
class VisionInputs:
    """Images and videos in the order of their tokens in the batch, row after row.

    The model's HuggingFace processor cuts both into patches and returns them as `pixel_values` and `image_grid_thw`, or
    `pixel_values_videos` and `video_grid_thw`, which are interleaved here as their tokens are.

    Attributes:
        pixel_values: float32 [patches, features]: normalized pixels, one flattened patch a row.
        grid_thw: int64 [items, 3]: patches of each image or video along time, height and width. It stays on the host,
            where indices are computed from it.

    Raises:
        ModelError: wrong dtypes, shapes or device, or a number of patches that differs from the grids'.
    """

    pixel_values: Tensor
    grid_thw: Tensor

    def __post_init__(self) -> None:
        pixels, grid = self.pixel_values, self.grid_thw
        if pixels.dim() != 2 or not pixels.is_floating_point():
            raise ModelError(f"pixel_values must be float [patches, features], got {pixels.dtype} {list(pixels.shape)}")
        if grid.dim() != 2 or grid.shape[1] != 3 or grid.dtype != torch.int64 or not len(grid):
            raise ModelError(f"grid_thw must be int64 [items, 3], got {grid.dtype} {list(grid.shape)}")
        if grid.device.type != "cpu":
            raise ModelError(f"grid_thw is on {grid.device}; leave it on the CPU")
        if int(grid.prod(-1).sum()) != len(pixels):
            raise ModelError(f"grid_thw {grid.tolist()} asks for {int(grid.prod(-1).sum())} patches, got {len(pixels)}")

    @classmethod
    def concatenate(cls, parts: "Sequence[VisionInputs]") -> "VisionInputs | None":
        """Concatenate the inputs of several samples, in order; None for no parts (a micro-batch of text only)."""
        if not parts:
            return None
        return cls(
            pixel_values=torch.cat([part.pixel_values for part in parts]),
            grid_thw=torch.cat([part.grid_thw for part in parts]),
        )

    def to(self, device: torch.device | str) -> Self:
        """Return a copy with the pixels on `device`, without waiting for the transfer."""
        return type(self)(pixel_values=to_device(self.pixel_values, device), grid_thw=self.grid_thw)


def to_device(tensor: Tensor, device: torch.device | str) -> Tensor:
    """Copy `tensor` to `device` without waiting for the work that is in flight there.

    A copy from pageable memory would wait for it. From pinned memory the copy is queued like a kernel.
    """
    if tensor.device.type == "cpu" and torch.device(device).type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
