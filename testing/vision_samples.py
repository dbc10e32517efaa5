"""Sequences with images and videos of several sizes, and the results of transformers for each alone."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from testing.tiny_models import IMAGE_TOKEN, MERGE_SIZE, PATCH_FEATURES, VIDEO_TOKEN, VISION_END, VISION_START

# Numbers are runs of text, triples are grids (time, height, width in patches) of images, and of videos behind a "v".
# Odd lengths, so that sequence parallelism must pad.
LAYOUTS: dict[str, list[Any]] = {
    "one image": [4, (1, 4, 6), 5],
    "images of several sizes": [3, (1, 2, 4), (1, 6, 2), 2, (1, 4, 4), 7],
    "text": [11],
    "one token": [1],
    "video": [2, "v", (3, 4, 2), 4],
    "image and videos": ["v", (2, 2, 2), 3, (1, 4, 2), 1, "v", (2, 4, 4), 6],
}
SECONDS_PER_GRID = 2.0


def make_sample(layout: list[Any], frames_are_runs: bool, generator: torch.Generator) -> dict[str, Any]:
    """The tokens of one sequence, and its images and videos in order."""
    tokens: list[int] = []
    grids: list[tuple[int, int, int]] = []
    is_video: list[bool] = []
    for part, before in zip(layout, [None, *layout[:-1]], strict=True):
        if part == "v":
            continue
        if isinstance(part, int):
            tokens += torch.randint(IMAGE_TOKEN, (part,), generator=generator).tolist()
            continue
        grids.append(part)
        is_video.append(before == "v")
        frames, per_frame = part[0], part[1] * part[2] // MERGE_SIZE**2
        placeholder = VIDEO_TOKEN if before == "v" else IMAGE_TOKEN
        if before == "v" and frames_are_runs:
            for frame in range(frames):  # text between the frames gives the time
                tokens += [100 + frame, VISION_START, *[placeholder] * per_frame, VISION_END]
        else:
            tokens += [VISION_START, *[placeholder] * (frames * per_frame), VISION_END]
    pixels = [torch.randn(t * h * w, PATCH_FEATURES, generator=generator) for t, h, w in grids]
    return {
        "tokens": torch.tensor(tokens),
        "pixel_values": torch.cat(pixels) if pixels else None,
        "grid_thw": torch.tensor(grids) if grids else None,
        "is_video": is_video,
    }


def transformers_inputs(sample: dict[str, Any]) -> dict[str, Any]:
    """Return the inputs of a transformers model, with images and videos separate."""
    tokens: Tensor = sample["tokens"]
    inputs: dict[str, Any] = {
        "input_ids": tokens[None],
        "mm_token_type_ids": ((tokens == IMAGE_TOKEN).int() + 2 * (tokens == VIDEO_TOKEN).int())[None],
    }
    if sample["grid_thw"] is None:
        return inputs
    items = list(
        zip(sample["grid_thw"], sample["pixel_values"].split(sample["grid_thw"].prod(-1).tolist()), strict=True)
    )
    for name, grid_name, wanted in (
        ("pixel_values", "image_grid_thw", False),
        ("pixel_values_videos", "video_grid_thw", True),
    ):
        chosen = [item for item, video in zip(items, sample["is_video"], strict=True) if video == wanted]
        if chosen:
            inputs[grid_name] = torch.stack([grid for grid, _ in chosen])
            inputs[name] = torch.cat([pixels for _, pixels in chosen])
    return inputs


def write_reference(model: PreTrainedModel, directory: Path, *, frames_are_runs: bool) -> None:
    """Write a .pt file of samples with positions and logits, and a directory of gradients, beside `directory`.

    The gradients are those of the cross entropy summed over all samples, under the names of the weights.
    """
    generator = torch.Generator().manual_seed(1)
    samples = {name: make_sample(layout, frames_are_runs, generator) for name, layout in LAYOUTS.items()}
    loss = torch.zeros(())
    for sample in samples.values():
        inputs = transformers_inputs(sample)
        if not frames_are_runs and any(sample["is_video"]):
            inputs["second_per_grid_ts"] = torch.full((sum(sample["is_video"]),), SECONDS_PER_GRID)
        logits = model(**inputs).logits[0]
        loss = loss + torch.nn.functional.cross_entropy(logits[:-1], sample["tokens"][1:], reduction="sum")
        grids = {key: value for key, value in inputs.items() if not key.startswith("pixel_values")}
        sample["position_ids"] = model.model.get_rope_index(**grids)[0][:, 0]
        sample["logits"] = logits.detach()
    loss.backward()
    torch.save(samples, directory.with_suffix(".pt"))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)
    model.save_pretrained(gradients_of(directory))


def gradients_of(directory: Path) -> Path:
    return directory.with_name(f"{directory.name}-gradients")
