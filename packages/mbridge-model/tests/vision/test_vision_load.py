"""Loading and calling vision-language models: what is forced, frozen, divided over stages, and refused."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from mbridge_model import Freeze, ModelError, Parallel
from mbridge_model.vision.stages import deepstack_stage_sizes

from testing.gang import Gang, WorkerPool
from testing.tiny_models import IMAGE_TOKEN, PATCH_FEATURES, make_model, make_vision_model

Make = Callable[..., Path]


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Make:
    def build(family: str, **changes: dict[str, Any]) -> Path:
        directory = tmp_path_factory.mktemp("load") / family
        make_vision_model(family, False, directory, **changes)
        return directory

    return build


@pytest.fixture(scope="module")
def qwen3(make: Make) -> Path:
    return make("qwen3_vl")


def load_lines(directory: Path, parallel: Parallel, overrides: dict[str, Any]) -> list[str]:
    """Runs in a worker. What is logged, and the message of the error, if there is one, at the end."""
    from mbridge_model import load
    from megatron.core import parallel_state

    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("mbridge_model")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        load(directory, parallel, overrides)
    except ModelError as error:
        lines.append(str(error))
    finally:
        logger.removeHandler(handler)
        parallel_state.destroy_model_parallel()
    return lines


def test_changes_of_the_provider_are_logged(gang2: Gang, make: Make) -> None:
    lines, _ = gang2.run(load_lines, make("qwen3_vl_moe"), Parallel(tensor=2), {})
    assert "provider.freeze_language_model: True -> False (what `freeze` says)" in lines
    assert (
        "provider.sequence_parallel: False -> True (Megatron-Core trains experts under tensor parallelism only with it)"
    ) in lines


def test_a_stage_of_all_features_is_logged(gang2: Gang, qwen3: Path) -> None:
    lines, _ = gang2.run(load_lines, qwen3, Parallel(pipeline=2), {})
    layout = [["embedding", "decoder", "decoder", "decoder"], ["decoder", "loss"]]
    assert (
        f"provider.pipeline_model_parallel_layout: None -> {layout} "
        "(the first 3 layers take deepstack features, and stand on the first stage where they can)"
    ) in lines


REFUSED: dict[str, tuple[str, dict[str, Any], dict[str, Any], str]] = {
    "fewer layers than deepstack features": (
        "qwen3_vl",
        {"text": {"num_hidden_layers": 2}},
        {},
        "config.json has 3 deepstack_visual_indexes in vision_config, but only 2 language layers (num_hidden_layers)",
    ),
    "fused rotary embedding": (
        "qwen3_vl",
        {},
        {"apply_rope_fusion": True},
        "override apply_rope_fusion=True cannot be: the fused kernel cannot take the angles of Qwen3-VL",
    ),
    "fused rotary embedding of Qwen2.5-VL": (
        "qwen2_5_vl",
        {},
        {"apply_rope_fusion": True},
        "override apply_rope_fusion=True cannot be: the fused kernel would count the positions",
    ),
    "no biases": (
        "qwen2_5_vl",
        {},
        {"add_qkv_bias": False},
        "override add_qkv_bias=False cannot be: Qwen2 checkpoints",
    ),
    "no norms": ("qwen3_vl", {}, {"qk_layernorm": False}, "override qk_layernorm=False cannot be: Qwen3 checkpoints"),
    "scaled rotary embedding": (
        "qwen2_5_vl",
        {
            "text": {
                "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
            }
        },
        {},
        "config.json has rope_type 'linear' in ",
    ),
    "sections of another head": (
        "qwen3_vl",
        {"text": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [6, 5, 4]}}},
        {},
        "config.json has mrope_section [6, 5, 4], which adds up to 15; heads of 32 channels have 16 frequencies",
    ),
    "another activation in the tower": (
        "qwen3_vl",
        {"vision": {"hidden_act": "silu"}},
        {},
        "vision_config.hidden_act is 'silu'; Qwen3-VL's tower is built with 'gelu_pytorch_tanh'",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(worker_pool: WorkerPool, make: Make, case: str) -> None:
    family, changes, overrides, message = REFUSED[case]
    ((*_, last),) = Gang(1, worker_pool).run(load_lines, make(family, **changes), Parallel(), overrides)
    assert message in last


@pytest.mark.parametrize(
    ("layers", "stages", "sizes"),
    [
        (36, 4, None),  # nine each
        (4, 1, None),
        (4, 2, [3, 1]),
        (6, 3, [3, 2, 1]),
        (5, 3, [3, 1, 1]),
        (16, 8, [3, 2, 2, 2, 2, 2, 2, 1]),
        (4, 4, None),  # a layer must be left for each later stage
        (3, 3, None),
    ],
)
def test_sizes_of_stages(layers: int, stages: int, sizes: list[int] | None) -> None:
    assert deepstack_stage_sizes(layers, stages, features=3) == sizes
    assert deepstack_stage_sizes(layers, stages, features=0) is None


def trained_parts(directory: Path, frozen: Freeze) -> set[str]:
    from mbridge_model import load

    model, _ = load(directory, freeze=frozen, weights=False)
    parts = set()
    for name, parameter in model[0].named_parameters():
        if parameter.requires_grad:
            is_projection = "merger" in name
            parts.add("language" if name.startswith("language_model.") else "projection" if is_projection else "vision")
    return parts


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_frozen_parts(worker_pool: WorkerPool, make: Make, family: str) -> None:
    directory, gang = make(family), Gang(1, worker_pool)
    assert gang.run(trained_parts, directory, Freeze()) == [{"language", "vision", "projection"}]
    assert gang.run(trained_parts, directory, Freeze(language_model=True)) == [{"vision", "projection"}]
    assert gang.run(trained_parts, directory, Freeze(vision_model=True)) == [{"language", "projection"}]
    assert gang.run(trained_parts, directory, Freeze(vision_projection=True)) == [{"language", "vision"}]
    only_projection = Freeze(language_model=True, vision_model=True)
    assert gang.run(trained_parts, directory, only_projection) == [{"projection"}]


def test_a_model_of_text_has_no_parts_to_freeze(worker_pool: WorkerPool, tmp_path: Path) -> None:
    make_model("qwen3", False, tmp_path)
    (message,) = Gang(1, worker_pool).run(freeze_error, tmp_path)
    assert "asks to freeze parts of a model of text alone (family qwen3)" in message


def freeze_error(directory: Path) -> str:
    from mbridge_model import load

    with pytest.raises(ModelError) as raised:
        load(directory, freeze=Freeze(vision_model=True))
    return str(raised.value)


def text_gradients(directory: Path) -> tuple[list[str], list[str]]:
    """After a backward pass over text with the language model frozen: parameters with a gradient, and not of zeros."""
    from mbridge_model import forward, load

    model, _ = load(directory, freeze=Freeze(language_model=True))
    output = forward(model[0], tokens=torch.arange(6)[None], position_ids=torch.arange(6)[None])
    output.sum().backward()
    gradients = {name: p.grad for name, p in model[0].named_parameters() if p.grad is not None}
    return sorted(gradients), [name for name, gradient in gradients.items() if gradient.any()]


def test_text_gives_the_tower_gradients_of_zeros(worker_pool: WorkerPool, qwen3: Path) -> None:
    """Without them Megatron-Core's overlapped gradient reduction waits for a bucket that never fills."""
    ((with_gradient, not_zero),) = Gang(1, worker_pool).run(text_gradients, qwen3)
    assert len(with_gradient) == 3 + 12 * 4 + 6 * 4
    assert not_zero == []


def wrong_inputs(directory: Path) -> list[str]:
    from mbridge_model import VisionInputs, forward, load

    model, _ = load(directory)
    messages = []
    pixels = VisionInputs(pixel_values=torch.randn(8, PATCH_FEATURES), grid_thw=torch.tensor([[1, 2, 4]]))
    for tokens, vision in (([1, IMAGE_TOKEN, 2], None), ([1, IMAGE_TOKEN, 2], pixels), ([1, 2], pixels)):
        with pytest.raises(ModelError) as raised:
            forward(
                model[0],
                tokens=torch.tensor([tokens]),
                position_ids=torch.arange(len(tokens))[None],
                vision=vision,
            )
        messages.append(str(raised.value))
    return messages


def test_placeholders_must_match_the_images(worker_pool: WorkerPool, qwen3: Path) -> None:
    (messages,) = Gang(1, worker_pool).run(wrong_inputs, qwen3)
    for message, (placeholders, features) in zip(messages, [(1, 0), (1, 2), (0, 2)], strict=True):
        assert f"the tokens hold {placeholders} placeholders" in message
        assert f"pixel_values give {features} features" in message
