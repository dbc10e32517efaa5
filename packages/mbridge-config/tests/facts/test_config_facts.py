"""Reading a HuggingFace directory: geometry, tokenizer sizes, and every way it can be broken."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mbridge_config import ConfigError, HFFacts
from mbridge_config.facts.tokenizer import tokenizer_size

MakeModel = Callable[..., Path]


def failing(directory: Path) -> ConfigError:
    with pytest.raises(ConfigError) as error:
        HFFacts.load(directory)
    return error.value


def test_geometry(model: Path) -> None:
    facts = HFFacts.load(model)
    assert facts.architectures == ("Qwen2ForCausalLM",)
    assert (facts.num_layers, facts.hidden_size, facts.ffn_hidden_size) == (6, 96, 168)
    assert (facts.num_attention_heads, facts.num_query_groups, facts.head_dim) == (12, 2, 8)
    assert (facts.vocab_size, facts.tied_embeddings, facts.rope_theta) == (211, True, 1000000.0)
    assert facts.qkv_bias is True and facts.qk_layernorm is None and not facts.has_vision


def test_agrees_with_transformers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    for kind, forced in (("Qwen2", "qkv_bias"), ("Qwen3", "qk_layernorm"), ("Llama", None)):
        config = getattr(transformers, f"{kind}Config")(
            architectures=[f"{kind}ForCausalLM"],
            num_hidden_layers=3,
            hidden_size=64,
            intermediate_size=88,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=99,
        )
        config.save_pretrained(tmp_path / kind)
        facts = HFFacts.load(tmp_path / kind)
        assert (facts.num_layers, facts.hidden_size, facts.ffn_hidden_size) == (3, 64, 88)
        assert (facts.num_attention_heads, facts.num_query_groups, facts.vocab_size) == (4, 2, 99)
        assert facts.tied_embeddings == config.tie_word_embeddings
        assert facts.rope_theta == config.rope_parameters["rope_theta"]
        assert facts.head_dim == getattr(config, "head_dim", None) or facts.head_dim == 16
        assert forced is None or getattr(facts, forced) is True


def test_nested_text_model(make_model: MakeModel, geometry: dict[str, Any], tmp_path: Path) -> None:
    directory = make_model(tmp_path / "vl")
    text = geometry | {"model_type": "qwen2_5_vl_text", "tie_word_embeddings": False}
    top = {"architectures": ["Qwen2_5_VLForConditionalGeneration"], "model_type": "qwen2_5_vl", "vision_config": {}}
    (directory / "config.json").write_text(json.dumps(top | {"text_config": text}))
    facts = HFFacts.load(directory)
    assert facts.num_layers == 6 and facts.has_vision and facts.qkv_bias is True and not facts.tied_embeddings
    (directory / "config.json").write_text(json.dumps(top | {"text_config": text, "tie_word_embeddings": True}))
    assert HFFacts.load(directory).tied_embeddings, "the whole model decides, not its text part"


def test_head_dim_is_not_always_a_quotient(make_model: MakeModel, tmp_path: Path) -> None:
    assert HFFacts.load(make_model(tmp_path / "a", head_dim=32)).head_dim == 32
    assert HFFacts.load(make_model(tmp_path / "b", num_key_value_heads=None)).num_query_groups == 12
    assert "add head_dim" in str(failing(make_model(tmp_path / "c", hidden_size=97)))


@pytest.mark.parametrize(
    ("changes", "identity", "text"),
    [
        ({"architectures": None}, "hf-config-architectures", "no `architectures`"),
        ({"architectures": []}, "hf-config-architectures", "no `architectures`"),
        ({"num_hidden_layers": None}, "hf-config-field", "no num_hidden_layers"),
        ({"num_hidden_layers": "6"}, "hf-config-field", "num_hidden_layers is '6'"),
        ({"hidden_size": 0}, "hf-config-field", "hidden_size is 0"),
        ({"vocab_size": True}, "hf-config-field", "vocab_size is True"),
        ({"num_key_value_heads": 5}, "hf-config-field", "12 is not a multiple of num_key_value_heads 5"),
        ({"layer_types": ["full_attention"] * 8}, "hf-config-field", "num_hidden_layers is 6, and layer_types names 8"),
        ({"layer_types": []}, "hf-config-field", "num_hidden_layers is 6, and layer_types names 0"),
        (
            {"eos_token_id": 99999999},
            "hf-config-field",
            "config.json has eos_token_id 99999999, and the vocabulary has",
        ),
        ({"eos_token_id": [1, "</s>"]}, "hf-config-field", "config.json has eos_token_id [1, '</s>']"),
        ({"layer_types": "full_attention"}, "hf-config-field", "layer_types is 'full_attention', not a list"),
    ],
)
def test_bad_fields(make_model: MakeModel, tmp_path: Path, changes: dict[str, Any], identity: str, text: str) -> None:
    error = failing(make_model(tmp_path / "bad", **changes))
    assert [problem.id for problem in error.problems] == [identity]
    assert text in str(error) and "config.json" in str(error)


def test_end_tokens(make_model: MakeModel, tmp_path: Path) -> None:
    directory = make_model(tmp_path / "model", eos_token_id=[1, 2], text_config=None)
    (directory / "generation_config.json").write_text('{"eos_token_id": 99999999}')
    assert "generation_config.json has eos_token_id 99999999" in str(failing(directory))
    (directory / "generation_config.json").write_text('{"eos_token_id": 1}')
    HFFacts.load(directory)


def test_layer_types_that_fit(make_model: MakeModel, tmp_path: Path) -> None:
    for name, value in (("as-many", ["full_attention"] * 6), ("null", None)):
        assert HFFacts.load(make_model(tmp_path / name, layer_types=value)).num_layers == 6


def test_all_bad_fields_at_once(make_model: MakeModel, tmp_path: Path) -> None:
    error = failing(make_model(tmp_path / "bad", architectures=None, num_hidden_layers=None, vocab_size=-1))
    assert len(error.problems) == 3


def test_broken_directories(model: Path, tmp_path: Path) -> None:
    assert failing(tmp_path / "nowhere").problems[0].id == "hf-directory-missing"
    assert "it is a file" in str(failing(model / "config.json"))
    (tmp_path / "empty").mkdir()
    assert failing(tmp_path / "empty").problems[0].id == "hf-config-missing"


@pytest.mark.parametrize(
    ("content", "line", "text"),
    [
        (b'{\n  "a": 1,\n  "b" 2\n}', 3, "not valid JSON"),
        (b"", 1, "not valid JSON"),
        (b"[1]", None, "holds list, not an object"),
        (b"\xff\xfe\x00", None, "cannot be read"),
        (b"[" * 100_000, None, "config.json"),
    ],
    ids=["line", "empty", "list", "bytes", "deep"],
)
def test_broken_json(model: Path, content: bytes, line: int | None, text: str) -> None:
    (model / "config.json").write_bytes(content)
    (problem,) = failing(model).problems
    assert problem.id == "hf-config-json" and text in problem.reason
    assert problem.where is not None and (line is None or problem.where.line == line)


def test_tokenizer_sizes(tmp_path: Path) -> None:
    def size(**files: Any) -> int | None:
        directory = tmp_path / str(len(list(tmp_path.iterdir())))
        directory.mkdir()
        for name, content in files.items():
            (directory / name.replace("__", ".")).write_text(json.dumps(content))
        return tokenizer_size(directory)

    bpe = {"model": {"vocab": {"a": 0, "b": 6}}, "added_tokens": [{"id": 8, "content": "<end>"}]}
    assert size(tokenizer__json=bpe) == 9
    assert size(tokenizer__json={"model": {"vocab": [["a", -1.0], ["b", -2.0]]}}) == 2
    assert size(vocab__json={"a": 0, "b": 1}, added_tokens__json={"<end>": 5}) == 6
    assert size(tokenizer__json=bpe, tokenizer_config__json={"added_tokens_decoder": {"11": {}}}) == 12
    assert size(tokenizer_config__json={}) is None


def test_tokenizer_agrees_with_tokenizers(tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab={"a": 0, "b": 1, "ab": 2}, merges=[("a", "b")]))
    tokenizer.add_special_tokens(["<pad>", "<end>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert tokenizer_size(tmp_path) == tokenizer.get_vocab_size() == 5


def test_broken_tokenizers(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no tokenizer"):
        tokenizer_size(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"model":\n')
    with pytest.raises(ConfigError, match=r"tokenizer.json is not valid JSON.*line 2"):
        tokenizer_size(tmp_path)
