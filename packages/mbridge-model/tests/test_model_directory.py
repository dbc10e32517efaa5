"""A directory that cannot work is one clear error, before anything is built."""

import json
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
from mbridge_model.directory import open_directory, tensor_names
from mbridge_model.errors import ModelError


def entry(shape: list[int], begin: int, end: int) -> dict[str, object]:
    return {"dtype": "F32", "shape": shape, "data_offsets": [begin, end]}


def header(entries: dict[str, object]) -> bytes:
    """A safetensors file of 12 bytes of data."""
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text + b"\0" * 12


def safetensors_bytes() -> bytes:
    return header({"weight": entry([3], 0, 12)})


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A directory that passes."""
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"], "vocab_size": 7}))
    (tmp_path / "model.safetensors").write_bytes(safetensors_bytes())
    return tmp_path


def test_a_good_directory(directory: Path) -> None:
    found = open_directory(directory)
    assert (found.architecture, found.vocab_size) == ("LlamaForCausalLM", 7)
    assert found.files == {"weight": directory / "model.safetensors"}


def test_the_vocabulary_of_a_vision_language_model_is_its_text_model_s(directory: Path) -> None:
    config = {"architectures": ["X"], "text_config": {"vocab_size": 9}}
    (directory / "config.json").write_text(json.dumps(config))
    assert open_directory(directory).vocab_size == 9


def test_without_weights_only_the_config_counts(directory: Path) -> None:
    (directory / "model.safetensors").unlink()
    assert open_directory(directory, needs_weights=False).files == {}
    with pytest.raises(ModelError, match="has neither model.safetensors nor model.safetensors.index.json; only"):
        open_directory(directory)


def test_missing_directory(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"nowhere does not exist; give the path of a HuggingFace checkpoint"):
        open_directory(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, r"config\.json does not exist; .* right directory\?"),
        ('{"architectures": [', r"config\.json is not valid JSON .*; download it again"),
        ("\udcff", r"config\.json is not valid JSON .*; download it again"),
        ("[]", r"config\.json holds a JSON list, not an object"),
        ("{}", r"config\.json has no 'architectures'; it must name the model class"),
        ('{"architectures": []}', r"config\.json has no 'architectures'"),
        ('{"architectures": "LlamaForCausalLM"}', r"config\.json has no 'architectures'"),
        ('{"architectures": [3]}', r"config\.json has no 'architectures'"),
        ('{"architectures": ["LlamaForCausalLM"]}', r"config\.json has no 'vocab_size'"),
        ('{"architectures": ["LlamaForCausalLM"], "vocab_size": "many"}', r"config\.json has no 'vocab_size'"),
        ('{"architectures": ["LlamaForCausalLM"], "text_config": 3}', r"config\.json has no 'vocab_size'"),
    ],
)
def test_bad_config(directory: Path, text: str | None, message: str) -> None:
    (directory / "config.json").unlink()
    if text is not None:
        (directory / "config.json").write_text(text, encoding="utf-8", errors="surrogateescape")
    with pytest.raises(ModelError, match=message):
        open_directory(directory)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dtype": "auto"}, r"config\.json has dtype 'auto', which is no dtype .*; write .*\"bfloat16\""),
        ({"torch_dtype": "half precision"}, r"config\.json has torch_dtype 'half precision'"),
        ({"text_config": {"vocab_size": 7, "dtype": "auto"}}, r"config\.json has dtype 'auto'"),
        (
            {"eos_token_id": "</s>"},
            r"config\.json has eos_token_id '</s>', where '</s>' is no whole number; give",
        ),
        ({"eos_token_id": [2, True]}, r"config\.json has eos_token_id \[2, True\], where True is no whole number"),
        ({"eos_token_id": 7}, r"config\.json has eos_token_id 7, but the vocabulary has the ids 0 to 6 .*; correct"),
        ({"eos_token_id": [2, -1]}, r"config\.json has eos_token_id \[2, -1\], but the vocabulary"),
        ({"text_config": {"vocab_size": 7, "eos_token_id": 7}}, r"config\.json has eos_token_id 7, but the vocabulary"),
    ],
)
def test_values_that_nothing_can_use(directory: Path, changes: dict[str, object], message: str) -> None:
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(ModelError, match=message):
        open_directory(directory, needs_weights=False)


def test_end_tokens_of_the_generation_config(directory: Path) -> None:
    file = directory / "generation_config.json"
    file.write_text(json.dumps({"eos_token_id": [2, 6]}))
    open_directory(directory)
    file.write_text(json.dumps({"eos_token_id": [2, 151643]}))
    with pytest.raises(ModelError, match=r"generation_config\.json has eos_token_id \[2, 151643\], .* ids 0 to 6 "):
        open_directory(directory)


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "lm_head.weight"])
@pytest.mark.parametrize(("rows", "columns"), [(3, 1), (1, 3)])
def test_rows_of_the_vocabulary(directory: Path, name: str, rows: int, columns: int) -> None:
    (directory / "model.safetensors").write_bytes(header({name: entry([rows, columns], 0, 12)}))
    found = f"'{name}' in .*model.safetensors has {rows} rows"
    with pytest.raises(ModelError, match=rf'config\.json has vocab_size 7, but {found}; write "vocab_size": {rows}'):
        open_directory(directory)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content[:-1], "file not fully covered"),
        (lambda content: content + b"\0", "file not fully covered"),
        (lambda content: b"", "header too small"),
        (lambda content: content[:7], "header too small"),
        (lambda content: content[:40], "invalid header length"),
        (lambda content: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "header too large"),
        (lambda content: struct.pack("<Q", 2**63) + content[8:], "header too large"),
        (lambda content: struct.pack("<Q", 4) + b"null" + content, "invalid JSON in header"),
        (lambda content: struct.pack("<Q", 4) + b"\xff{}}" + content, "invalid UTF-8 in header"),
        (lambda content: content.replace(b"[0, 12]", b"[0,   ]"), "invalid JSON in header"),
        (lambda content: content.replace(b"[0, 12]", b'[0,"x"]'), "invalid JSON in header"),
        (lambda content: content.replace(b"data_offsets", b"xxxxxxxxxxxx"), "missing field `data_offsets`"),
        (lambda content: header({"a": entry([2**62, 2**62], 0, 12)}), "overflow computing buffer size"),
        (lambda content: header({"a": entry([2], 0, 8), "b": entry([2], 4, 12)}), "invalid offset for tensor `b`"),
    ],
)
def test_bad_weights(directory: Path, change: Callable[[bytes], bytes], message: str) -> None:
    file = directory / "model.safetensors"
    file.write_bytes(change(file.read_bytes()))
    with pytest.raises(
        ModelError,
        match=rf"model\.safetensors is not a whole safetensors file \(\d+ bytes; .*{message}.*; download it again",
    ):
        open_directory(directory)


def test_index(directory: Path) -> None:
    index = directory / "model.safetensors.index.json"
    names = ("one.safetensors", "two.safetensors")
    (directory / names[0]).write_bytes(header({"a": entry([2], 0, 8), "c": entry([1], 8, 12)}))
    (directory / names[1]).write_bytes(header({"b": entry([3], 0, 12)}))
    index.write_text(json.dumps({"weight_map": {"a": names[0], "b": names[1], "c": names[0]}}))
    assert {name: file.name for name, file in open_directory(directory).files.items()} == {
        "a": names[0],
        "b": names[1],
        "c": names[0],
    }
    index.write_text(json.dumps({"weight_map": {"a": names[1], "b": names[1], "c": names[0]}}))
    with pytest.raises(ModelError, match=r"index\.json says that 'two\.safetensors' holds 1 tensor.*, first 'a'; down"):
        open_directory(directory)
    (directory / names[1]).unlink()
    with pytest.raises(ModelError, match=r"index\.json names 1 file\(s\) .*, first 'two\.safetensors'; complete"):
        open_directory(directory)


@pytest.mark.parametrize(
    "content", ['{"weight_map": []}', "{}", '{"weight_map": {}}', '{"weight_map": {"a": 1}}', '{"weight_map": 3}']
)
def test_broken_index(directory: Path, content: str) -> None:
    (directory / "model.safetensors.index.json").write_text(content)
    with pytest.raises(ModelError, match=r"index\.json has no 'weight_map' from tensor names to file names"):
        open_directory(directory)


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/passwd", "sub/one.safetensors"])
def test_an_index_names_files_of_its_own_directory(directory: Path, name: str) -> None:
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(ModelError, match=r"index\.json names .*, which is not in its own directory"):
        open_directory(directory)


def test_empty_file_without_tensors(tmp_path: Path) -> None:
    file = tmp_path / "empty.safetensors"
    file.write_bytes(struct.pack("<Q", 2) + b"{}")
    assert tensor_names(file) == set()
