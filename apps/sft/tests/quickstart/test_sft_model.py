"""The tiny vision-language model is an ordinary HuggingFace directory, the same for the same seed."""

from pathlib import Path
from typing import Any

import torch
from mbridge_config.schema.sft import SFTQuickstartConfig
from mbridge_sft.quickstart.model import END_OF_TURN, write_tiny_vision_model
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

CORPUS = ["Which digit is this?\nChoose one:\n"]


def test_directory_loads_and_is_reproducible(tmp_path: Path) -> None:
    state = torch.random.get_rng_state()
    one = write_tiny_vision_model(tmp_path / "one", CORPUS, seed=1)
    assert torch.equal(torch.random.get_rng_state(), state)
    two = write_tiny_vision_model(tmp_path / "two", CORPUS, seed=1)
    other = write_tiny_vision_model(
        tmp_path / "other", CORPUS, seed=2, geometry=SFTQuickstartConfig(tie_word_embeddings=True)
    )
    files = sorted(path.name for path in one.iterdir())
    assert all((one / name).read_bytes() == (two / name).read_bytes() for name in files)
    assert (one / "model.safetensors").read_bytes() != (other / "model.safetensors").read_bytes()
    for directory, tied in ((one, False), (other, True)):
        # Two values, which the type that transformers declares leaves out.
        loaded: Any = AutoModelForImageTextToText.from_pretrained(directory, output_loading_info=True)
        model, report = loaded
        assert type(model).__name__ == "Qwen3VLForConditionalGeneration"
        assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        assert (model.lm_head.weight is model.model.language_model.embed_tokens.weight) == tied
        assert model.generation_config.eos_token_id == AutoProcessor.from_pretrained(directory).tokenizer.eos_token_id


def test_geometry_is_what_was_asked_for(tmp_path: Path) -> None:
    geometry = SFTQuickstartConfig(
        hidden_size=64, num_hidden_layers=3, vision_depth=4, deepstack_visual_indexes=[0, 2, 3]
    )
    config = AutoConfig.from_pretrained(write_tiny_vision_model(tmp_path, CORPUS, seed=1, geometry=geometry))
    assert config.text_config.head_dim == 32
    assert (config.text_config.hidden_size, config.text_config.num_hidden_layers) == (64, 3)
    assert config.vision_config.deepstack_visual_indexes == [0, 2, 3]
    assert (config.vision_config.depth, config.vision_config.out_hidden_size) == (4, 64)
    assert config.text_config.vocab_size == 384


def test_processor_round_trips_and_knows_its_marks(tiny_vision_model: Path) -> None:
    processor = AutoProcessor.from_pretrained(tiny_vision_model)
    tokenizer = processor.tokenizer
    text = "3+10=13, 13-5=8\n\n Which digit? …é𝄞"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert [tokenizer.decode(token) for token in tokenizer("1078")["input_ids"]] == list("1078")
    assert tokenizer.eos_token == END_OF_TURN
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    marks = f"<|im_start|>{processor.image_token}{processor.video_token}<|vision_start|><|vision_end|>{END_OF_TURN}"
    assert len(tokenizer(marks)["input_ids"]) == 6
    assert tokenizer.decode(tokenizer(f"7{marks}")["input_ids"], skip_special_tokens=True) == "7"
    assert len(tokenizer) <= SFTQuickstartConfig().vocab_size
    config = AutoConfig.from_pretrained(tiny_vision_model)
    assert (config.image_token_id, config.video_token_id) == (processor.image_token_id, processor.video_token_id)
