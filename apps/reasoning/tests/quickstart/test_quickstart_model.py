"""The tiny model is an ordinary HuggingFace directory, the same for the same seed."""

import pytest
import torch
from mbridge_config.schema.reasoning import QuickstartConfig
from mbridge_reasoning.quickstart.model import ANSWER_TAGS, END_OF_TURN, write_tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer

CORPUS = [f"Calculate {a} + {b} - {a}. {a}+{b}={a + b}" for a in range(11) for b in range(11)]


@pytest.mark.parametrize("tied", [False, True])
def test_directory_loads_and_is_reproducible(tmp_path, tied):
    geometry = QuickstartConfig(tie_word_embeddings=tied)
    state = torch.random.get_rng_state()
    one = write_tiny_model(tmp_path / "one", CORPUS, seed=1, geometry=geometry)
    assert torch.equal(torch.random.get_rng_state(), state)
    two = write_tiny_model(tmp_path / "two", CORPUS, seed=1, geometry=geometry)
    other = write_tiny_model(tmp_path / "other", CORPUS, seed=2, geometry=geometry)
    files = sorted(path.name for path in one.iterdir())
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"} <= set(files)
    assert all((one / name).read_bytes() == (two / name).read_bytes() for name in files)
    assert (one / "model.safetensors").read_bytes() != (other / "model.safetensors").read_bytes()
    model = AutoModelForCausalLM.from_pretrained(one)
    assert type(model).__name__ == "Qwen2ForCausalLM"
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    assert model.model.layers[0].self_attn.head_dim == 32


def test_tokenizer_round_trips_and_knows_its_marks(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(write_tiny_model(tmp_path, CORPUS, seed=1))
    text = "3+10=13, 13-5=8\n\n <answer>8</answer> …é𝄞"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer.eos_token == END_OF_TURN
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    ids = tokenizer(f"<answer>13</answer>{END_OF_TURN}")["input_ids"]
    assert len(ids) == 5  # tag, one token a digit, tag, end
    assert tokenizer.decode(ids, skip_special_tokens=True) == "<answer>13</answer>"
    assert all(tag not in tokenizer.all_special_tokens for tag in ANSWER_TAGS)
    assert max(ids) < QuickstartConfig().vocab_size >= len(tokenizer)


def test_head_dim_other_than_32_is_refused(tmp_path):
    with pytest.raises(ValueError, match="set hidden_size to 128"):
        write_tiny_model(tmp_path, CORPUS, seed=1, geometry=QuickstartConfig(hidden_size=64, num_attention_heads=4))
