"""Numbers of parameters, compared with those of transformers' modules on the meta device."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mbridge_config import HFFacts
from mbridge_config.plan.parameters import Size, count_active_parameters, count_parameters, embedding

GEOMETRIES = sorted((Path(__file__).parents[1] / "geometries").glob("*.json"))
# What the published models' cards and weight files say.
PUBLISHED = {
    "llama-3.1-8b": 8_030_261_248,
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen2.5-7b": 7_615_616_512,
    "qwen2.5-32b": 32_763_876_352,
    "qwen2.5-vl-3b": 3_754_622_976,
    "qwen2.5-vl-7b": 8_292_166_656,
    "qwen3-4b": 4_022_468_096,
    "qwen3-30b-a3b": 30_532_122_624,
    "qwen3-vl-4b": 4_437_815_808,
    "qwen3-vl-30b-a3b": 31_070_754_032,
}
# Odd sizes, and each switch thrown: biases, norms, dense layers among those with experts, tied embeddings or not.
SMALL: dict[str, dict[str, Any]] = {
    "qwen2.5-1.5b": {"num_key_value_heads": 1, "tie_word_embeddings": False},
    "llama-3.1-8b": {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    "qwen3-4b": {"attention_bias": True, "head_dim": 10},
    "qwen3-30b-a3b": {"decoder_sparse_step": 2, "mlp_only_layers": [1], "num_hidden_layers": 5, "head_dim": 6},
    "qwen2.5-vl-3b": {"num_key_value_heads": 4},
    "qwen3-vl-4b": {"head_dim": 14, "tie_word_embeddings": False},
    "qwen3-vl-30b-a3b": {"mlp_only_layers": [0], "head_dim": 6},
}
SMALL_TEXT = {
    "hidden_size": 44,
    "intermediate_size": 52,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 151,
}
SMALL_EXPERTS = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 20}
SMALL_VISION = {"depth": 2, "hidden_size": 24, "intermediate_size": 28, "num_heads": 2, "out_hidden_size": 44}
SMALL_VISION |= {"patch_size": 6}


def shrunk(name: str, config: dict[str, Any]) -> dict[str, Any]:
    changes = SMALL[name]
    text = config.get("text_config", config)
    text |= SMALL_TEXT | (SMALL_EXPERTS if "num_experts" in text else {}) | changes
    if "vision_config" in config:
        config["tie_word_embeddings"] = text["tie_word_embeddings"]
        config["vision_config"] |= SMALL_VISION
        if "deepstack_visual_indexes" in config["vision_config"]:
            config["vision_config"] |= {"deepstack_visual_indexes": [0, 1], "num_position_embeddings": 9}
    return config


def counted_by_transformers(directory: Path) -> int:
    import torch
    import transformers

    config = transformers.AutoConfig.from_pretrained(directory)
    auto = transformers.AutoModelForImageTextToText if hasattr(config, "vision_config") else None
    with torch.device("meta"):
        model = (auto or transformers.AutoModelForCausalLM).from_config(config)
    return sum(parameter.numel() for parameter in model.parameters())


def test_published_numbers(tmp_path: Path) -> None:
    assert {file.stem for file in GEOMETRIES} == set(PUBLISHED)
    for file in GEOMETRIES:
        (tmp_path / "config.json").write_text(file.read_text())
        assert count_parameters(HFFacts.load(tmp_path)) == PUBLISHED[file.stem], file.stem


@pytest.mark.parametrize("size", ["real", "small"])
def test_counts_are_those_of_transformers(tmp_path: Path, size: str) -> None:
    pytest.importorskip("transformers")
    wrong = {}
    for file in GEOMETRIES:
        if file.stem not in SMALL:
            continue  # another size of the same classes
        config = json.loads(file.read_text())
        directory = tmp_path / file.stem
        directory.mkdir()
        (directory / "config.json").write_text(json.dumps(shrunk(file.stem, config) if size == "small" else config))
        counts = (count_parameters(HFFacts.load(directory)), counted_by_transformers(directory))
        if counts[0] != counts[1]:
            wrong[file.stem] = counts
    assert not wrong


def test_active_parameters(real_facts: Callable[[str], HFFacts]) -> None:
    """Qwen3-30B-A3B: 48 layers leave 120 experts of 3 x 2048 x 768 aside."""
    facts = real_facts("qwen3-30b-a3b")
    assert count_active_parameters(facts) == 30_532_122_624 - 48 * 120 * 3 * 2048 * 768
    assert count_active_parameters(real_facts("qwen3-vl-4b")) == 4_437_815_808


def test_unknown_architectures_are_not_counted(real_facts: Callable[[str], HFFacts]) -> None:
    facts = real_facts("llama-3.1-8b")
    assert count_parameters(facts) is not None
    assert count_parameters(dataclasses.replace(facts, model_type="deepseek_v3")) is None
    assert count_parameters(dataclasses.replace(facts, vocab_size=None)) is None
    assert count_parameters(dataclasses.replace(facts, has_vision=True)) is None, "a tower of another kind"


def test_shares_of_tensor_parallel_ranks(real_facts: Callable[[str], HFFacts]) -> None:
    assert Size(split=12, whole=5).on_rank(4) == 8
    facts = real_facts("qwen2.5-7b")
    # 152,064 rows are 1,188 x 128; for 8 ranks the multiple is 1,024
    assert embedding(facts, padded_for=1).split == 152_064 * 3584
    assert embedding(facts, padded_for=8).split == 152_576 * 3584
