"""Positions in three dimensions, and the images of a micro-batch. Parity with transformers: `test_vision_parity`."""

import json
from pathlib import Path

import pytest
import torch
from mbridge_model import ModelError, MropeSettings, VisionInputs, mrope_position_ids

SECONDS = MropeSettings(image_token_id=8, video_token_id=9, spatial_merge_size=2, tokens_per_second=3)
RUNS = MropeSettings(image_token_id=8, video_token_id=9, spatial_merge_size=2, tokens_per_second=None)


def test_text_counts_alike_in_all_dimensions() -> None:
    assert mrope_position_ids(torch.tensor([1, 2, 3]), None, SECONDS).tolist() == [[0, 1, 2]] * 3


def test_an_image_spans_its_grid() -> None:
    """Two rows of three tokens from position 2 on; the text goes on behind the three columns."""
    tokens = torch.tensor([1, 1, 8, 8, 8, 8, 8, 8, 1])
    times, rows, columns = mrope_position_ids(tokens, torch.tensor([[1, 4, 6]]), SECONDS).tolist()
    assert times == [0, 1, 2, 2, 2, 2, 2, 2, 5]
    assert rows == [0, 1, 2, 2, 2, 3, 3, 3, 5]
    assert columns == [0, 1, 2, 3, 4, 2, 3, 4, 5]


def test_a_video_counts_seconds() -> None:
    tokens = torch.tensor([9, 9, 9, 1])
    grid = torch.tensor([[3, 2, 2]])
    assert mrope_position_ids(tokens, grid, SECONDS)[0].tolist() == [0, 3, 6, 1]
    assert mrope_position_ids(tokens, grid, SECONDS, seconds_per_grid=[2.9])[0].tolist() == [0, 6, 12, 1]


def test_a_video_of_runs_counts_each_frame() -> None:
    tokens = torch.tensor([9, 1, 9, 8, 1])  # two frames with text between them, then an image
    grid = torch.tensor([[2, 2, 2], [1, 2, 2]])
    assert mrope_position_ids(tokens, grid, RUNS).tolist() == [[0, 1, 2, 3, 4]] * 3
    with pytest.raises(ModelError, match=r"grid \[2, 2, 2\] has 2 tokens, but 1 placeholder"):
        mrope_position_ids(tokens, grid, SECONDS)


@pytest.mark.parametrize(
    ("tokens", "grid", "message"),
    [
        ([8], None, r"more images and videos than the 0 grid\(s\)"),
        ([8, 8, 1], [[1, 2, 2]], r"grid \[1, 2, 2\] has 1 tokens, but 2 placeholder"),
        ([1, 1], [[1, 2, 2]], r"grid_thw has 1 grid\(s\), but the tokens hold 0 run\(s\)"),
    ],
)
def test_placeholders_must_match_the_grids(tokens: list[int], grid: list[list[int]] | None, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        mrope_position_ids(torch.tensor(tokens), None if grid is None else torch.tensor(grid), SECONDS)


def test_settings_of_a_directory(tmp_path: Path) -> None:
    config = {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "text_config": {"vocab_size": 10},
        "image_token_id": 8,
        "video_token_id": 9,
        "vision_config": {"spatial_merge_size": 2, "tokens_per_second": 3},
    }
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config))
    assert MropeSettings.from_directory(tmp_path) == SECONDS
    path.write_text(json.dumps(config | {"architectures": ["Qwen3VLForConditionalGeneration"]}))
    assert MropeSettings.from_directory(tmp_path) == RUNS
    path.write_text(json.dumps(config | {"vision_config": {}}))
    with pytest.raises(ModelError, match=r"config\.json has no 'spatial_merge_size'"):
        MropeSettings.from_directory(tmp_path)
    path.write_text(json.dumps(config | {"architectures": ["Qwen2ForCausalLM"]}))
    with pytest.raises(ModelError, match="Qwen2ForCausalLM .* has no three-dimensional positions"):
        MropeSettings.from_directory(tmp_path)


def test_inputs_are_checked_and_joined() -> None:
    first = VisionInputs(pixel_values=torch.zeros(4, 6), grid_thw=torch.tensor([[1, 2, 2]]))
    second = VisionInputs(pixel_values=torch.ones(8, 6), grid_thw=torch.tensor([[2, 2, 2]]))
    joined = VisionInputs.concatenate([first, second])
    assert joined is not None
    assert joined.grid_thw.tolist() == [[1, 2, 2], [2, 2, 2]]
    assert joined.pixel_values.sum() == 48
    assert VisionInputs.concatenate([]) is None
    with pytest.raises(ModelError, match=r"grid_thw \[\[1, 2, 2\]\] asks for 4 patches, got 5"):
        VisionInputs(pixel_values=torch.zeros(5, 6), grid_thw=torch.tensor([[1, 2, 2]]))
    with pytest.raises(ModelError, match=r"grid_thw must be int64 \[items, 3\], got torch.int32"):
        VisionInputs(pixel_values=torch.zeros(4, 6), grid_thw=torch.tensor([[1, 2, 2]], dtype=torch.int32))
    with pytest.raises(ModelError, match=r"pixel_values must be float \[patches, features\], got torch.uint8"):
        VisionInputs(pixel_values=torch.zeros(4, 6, dtype=torch.uint8), grid_thw=torch.tensor([[1, 2, 2]]))
