"""Positions of tokens in three dimensions: time, height and width (M-RoPE, Qwen2-VL, arXiv 2409.12191, section 2.1).

A text token has the same position in all three. The tokens of an image or video span its grid, and the text after them
continues after the larger of its height and width. Padding and packing move a sample's positions like its tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mbridge_model.directory import open_directory
from mbridge_model.errors import ModelError
from mbridge_model.families import find_family


@dataclass(frozen=True, kw_only=True, slots=True)
class MropeSettings:
    """Settings of a model that its positions depend on.

    Attributes:
        image_token_id: the placeholder of one merged patch of an image.
        video_token_id: the placeholder of one merged patch of a video.
        spatial_merge_size: patches along height, and along width, that become one token.
        tokens_per_second: positions along time per second of video; None for models whose positions do not count
            seconds: each frame is a separate run of tokens, and text between the runs gives the time.
    """

    image_token_id: int
    video_token_id: int
    spatial_merge_size: int
    tokens_per_second: int | None

    @classmethod
    def from_directory(cls, path: str | Path) -> "MropeSettings":
        """Read a HuggingFace directory's config.json.

        Raises:
            ModelError: it is no vision-language model of a known family, or a setting is missing.
        """
        directory = open_directory(path, needs_weights=False)
        vision = find_family(directory.architecture).vision
        if vision is None:
            raise ModelError(f"{directory.architecture} of {directory.path} has no three-dimensional positions here")
        try:
            config: dict[str, Any] = directory.config
            return cls(
                image_token_id=int(config["image_token_id"]),
                video_token_id=int(config["video_token_id"]),
                spatial_merge_size=int(config["vision_config"]["spatial_merge_size"]),
                tokens_per_second=(
                    None if vision.frames_are_runs else int(config["vision_config"]["tokens_per_second"])
                ),
            )
        except KeyError as error:
            raise ModelError(f"{directory.path / 'config.json'} has no {error.args[0]!r}; add it") from None


def mrope_position_ids(
    tokens: Tensor,
    grid_thw: Tensor | None,
    settings: MropeSettings,
    *,
    seconds_per_grid: Sequence[float] | None = None,
) -> Tensor:
    """Compute the positions of one sequence's tokens, equal to those of transformers' `get_rope_index`.

    Args:
        tokens: int64 [length], without padding.
        grid_thw: int64 [items, 3]: patches along time, height and width of each image and video, in the order of
            their tokens; None for a sequence of text.
        settings: of the model.
        seconds_per_grid: for each video, in order, the seconds between two steps along time, as the processor returns
            them in `second_per_grid_ts`; 1 each by default. Only models with `tokens_per_second` read it, and like
            transformers they cut it to whole seconds.

    Returns:
        int64 [3, length], on the device of `tokens`.

    Raises:
        ModelError: the runs of placeholder tokens do not match the grids.
    """
    kinds = torch.zeros_like(tokens)
    kinds[tokens == settings.image_token_id] = 1
    kinds[tokens == settings.video_token_id] = 2
    values, lengths = torch.unique_consecutive(kinds, return_counts=True)
    grids = _runs(grid_thw, values, settings)
    seconds = iter(seconds_per_grid or ())
    merge = settings.spatial_merge_size

    parts: list[Tensor] = []
    start = used = 0
    for kind, length in zip(values.tolist(), lengths.tolist(), strict=True):
        if kind == 0:
            parts.append(torch.arange(start, start + length).expand(3, -1))
            start += length
            continue
        if used == len(grids):
            raise ModelError(f"the tokens hold more images and videos than the {len(grids)} grid(s) of grid_thw")
        times, rows, columns = grids[used][0], grids[used][1] // merge, grids[used][2] // merge
        used += 1
        if times * rows * columns != length:
            raise ModelError(
                f"an image or video of grid {grids[used - 1]} has {times * rows * columns} tokens, but {length} "
                "placeholder(s) stand in a row in the text; was the text made for other images?"
            )
        step = 1
        if kind == 2 and settings.tokens_per_second is not None:
            step = settings.tokens_per_second * int(next(seconds, 1))
        axes = (torch.arange(times) * step, torch.arange(rows), torch.arange(columns))
        parts.append(torch.stack([axis.flatten() for axis in torch.meshgrid(*axes, indexing="ij")]) + start)
        start += max(rows, columns)
    if used != len(grids):
        raise ModelError(f"grid_thw has {len(grids)} grid(s), but the tokens hold {used} run(s) of placeholders")
    return torch.cat(parts, dim=1).to(tokens.device)


def _runs(grid_thw: Tensor | None, kinds: Tensor, settings: MropeSettings) -> list[list[int]]:
    """Return one grid for each run of placeholders; a video whose frames are separate runs has one per frame."""
    if grid_thw is None:
        return []
    if settings.tokens_per_second is not None:
        return grid_thw.tolist()
    runs: list[list[int]] = []
    visual = [kind for kind in kinds.tolist() if kind]
    for times, rows, columns in grid_thw.tolist():
        is_video = len(runs) < len(visual) and visual[len(runs)] == 2
        runs += [[1, rows, columns]] * times if is_video else [[times, rows, columns]]
    return runs
