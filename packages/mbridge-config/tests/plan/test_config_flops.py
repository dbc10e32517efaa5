"""Counted operations, compared with torch's counter on transformers' models."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mbridge_config import HFFacts
from mbridge_config.plan.flops import forward_flops

LENGTHS = (7, 12)
GRIDS = ((1, 10, 6), (2, 4, 8))  # windows of 4 x 4 patches cut the first unevenly; the second is a video

TEXT: dict[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 56,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 131,
    "eos_token_id": 130,
}
EXPERTS = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 20, "mlp_only_layers": [1]}
VISION = {"depth": 3, "hidden_size": 32, "intermediate_size": 40, "num_heads": 2, "patch_size": 4}
VISION |= {"out_hidden_size": 48}
QWEN3_VISION = VISION | {"num_position_embeddings": 36, "deepstack_visual_indexes": [0, 2]}
MODELS: dict[str, tuple[str, dict[str, Any], dict[str, Any] | None]] = {
    "llama": ("Llama", {}, None),
    "qwen2, tied": ("Qwen2", {"tie_word_embeddings": True}, None),
    "qwen3, wide heads": ("Qwen3", {"head_dim": 20}, None),
    "qwen3 with experts": ("Qwen3Moe", {"head_dim": 20} | EXPERTS, None),
    "qwen2.5-vl": ("Qwen2_5_VL", {}, VISION | {"window_size": 16, "fullatt_block_indexes": [1, 9]}),
    "qwen3-vl": ("Qwen3VL", {"head_dim": 16}, QWEN3_VISION),
    "qwen3-vl with experts": ("Qwen3VLMoe", {"head_dim": 16} | EXPERTS, QWEN3_VISION),
}


def make_config(name: str) -> Any:
    transformers = pytest.importorskip("transformers")
    kind, text, vision = MODELS[name]
    make = getattr(transformers, f"{kind}Config")
    if vision is None:
        return make(architectures=[f"{kind}ForCausalLM"], **(TEXT | text))
    sections = [2, 2, 2] if "head_dim" not in text else [3, 3, 2]
    rope = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": sections}}
    tokens = {"image_token_id": 120, "video_token_id": 121, "vision_start_token_id": 122, "vision_end_token_id": 123}
    architectures = [f"{kind}ForConditionalGeneration"]
    return make(architectures=architectures, text_config=TEXT | text | rope, vision_config=vision, **tokens)


def read_facts(config: Any, directory: Path) -> HFFacts:
    config.save_pretrained(directory)
    return HFFacts.load(directory)


@pytest.mark.parametrize("name", MODELS)
def test_operations_of_transformers(name: str, tmp_path: Path) -> None:
    """Forward and backward, to the last operation, sequence by sequence and image by image."""
    torch = pytest.importorskip("torch")
    import transformers
    from torch.utils.flop_counter import FlopCounterMode

    config = make_config(name)
    facts = read_facts(config, tmp_path)
    auto = transformers.AutoModelForImageTextToText if facts.vision else transformers.AutoModelForCausalLM
    model = auto.from_config(config, attn_implementation="eager", experts_implementation="eager")
    features = facts.vision.patch_features if facts.vision else 0
    inputs: list[dict[str, Any]] = [{"input_ids": torch.arange(length)[None]} for length in LENGTHS]
    grids = GRIDS if facts.vision else ()
    lengths = list(LENGTHS)
    for token, kind, grid in zip((120, 121), ("image", "video"), grids, strict=False):
        count = grid[0] * grid[1] * grid[2] // 4
        pixels = "pixel_values" if kind == "image" else "pixel_values_videos"
        # A video's frames are told apart by their timestamps, of which these random tokens have none.
        frames = torch.tensor([grid] if kind == "image" else [(1, *grid[1:])] * grid[0])
        parts = [torch.full((int(count // len(frames)),), token) for _ in frames]
        start, end = torch.tensor([122]), torch.tensor([123])
        ids = torch.cat([piece for part in parts for piece in (start, part, end)])
        inputs.append(
            {
                "input_ids": ids[None],
                pixels: torch.randn(grid[0] * grid[1] * grid[2], features),
                f"{kind}_grid_thw": torch.tensor([grid]),
                "position_ids": torch.arange(len(ids)).expand(3, 1, -1),
            }
        )
        lengths.append(len(ids))
    with FlopCounterMode(display=False) as counter:
        outputs = [model(**one).logits for one in inputs]
        forward = counter.get_total_flops()
        torch.stack([output.sum() for output in outputs]).sum().backward()
    found = forward_flops(facts, lengths, grids)
    assert found is not None
    width = facts.num_attention_heads * facts.head_dim
    # The eager model multiplies what the causal mask then hides, and angles of positions are matrix products, too.
    hidden_half = 2 * facts.num_layers * width * sum(length**2 for length in lengths)
    coordinates = 3 if facts.vision else 1
    angles = 2 * coordinates * sum(lengths) * facts.head_dim // 2
    assert found.total == forward - hidden_half - angles
    # Nobody needs gradients of pixels.
    first = 2 * features * (facts.vision.hidden_size if facts.vision else 0) * sum(t * h * w for t, h, w in grids)
    assert found.training() == counter.get_total_flops() - 3 * hidden_half - angles + first


def test_frozen_parts_cost_less(tmp_path: Path) -> None:
    """By hand: a frozen part with nothing trained before it has no backward pass, others have half of one."""
    facts = read_facts(make_config("qwen3-vl"), tmp_path)
    found = forward_flops(facts, LENGTHS, GRIDS)
    assert found is not None
    tower, merger, language = found.vision_model, found.vision_projection, found.language_model
    assert found.training() == 3 * found.total
    assert found.training(["vision_model", "vision_projection"]) == found.total + 2 * language.forward
    head = 2 * language.matrices + 3 * language.attention
    assert found.training(["language_model"]) == 3 * (tower.forward + merger.forward) + head
    assert found.training(["vision_model", "language_model"]) == tower.forward + 3 * merger.forward + head
    assert found.training(["vision_model", "vision_projection", "language_model"]) == found.total


def test_work_of_a_published_model(real_facts: Callable[[str], HFFacts]) -> None:
    """Qwen2.5-1.5B at 4096 tokens: 6 N + 6 L H seq a token, N with the tied head and without biases and norms."""
    found = forward_flops(real_facts("qwen2.5-1.5b"), [4096] * 3)
    assert found is not None
    weights = 28 * (1536 * (1536 + 256 + 256 + 1536) + 3 * 1536 * 8960) + 151936 * 1536
    assert found.training() / (3 * 4096) == 6 * weights + 6 * 28 * 1536 * 4096


def test_an_unknown_architecture_is_not_counted(real_facts: Callable[[str], HFFacts]) -> None:
    assert forward_flops(dataclasses.replace(real_facts("qwen2.5-1.5b"), model_type="gpt2"), [5]) is None
