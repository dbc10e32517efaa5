"""A HuggingFace model directory, checked before anything is built.

Only JSON files and the headers of safetensors files are read, so a mistake costs milliseconds; `check_tied_output`
alone reads weights.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from mbridge_model.errors import ModelError

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
# How the names of the matrices with a row per token end, in text and vision-language models alike.
_EMBEDDING, _OUTPUT = "embed_tokens.weight", "lm_head.weight"


@dataclass(frozen=True, kw_only=True, slots=True)
class HFDirectory:
    """A checked directory.

    Attributes:
        path: the directory.
        config: the content of config.json.
        files: the safetensors file of each tensor; empty where weights were not asked for.
    """

    path: Path
    config: dict[str, Any]
    files: Mapping[str, Path]

    @property
    def architecture(self) -> str:
        """The first entry of `architectures`, such as "Qwen2ForCausalLM"."""
        return str(self.config["architectures"][0])

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding, without the padding that tensor parallelism may add."""
        return int(self.config.get("text_config", self.config)["vocab_size"])


def open_directory(path: str | Path, *, needs_weights: bool = True) -> HFDirectory:
    """Check a HuggingFace model directory.

    Args:
        path: the directory. A model name on a hub is not resolved: download it first.
        needs_weights: also check that all safetensors files are present and complete.

    Raises:
        ModelError: naming the file, what is wrong with it, and the fix.
    """
    directory = Path(path)
    if not directory.is_dir():
        raise ModelError(
            f"model directory {directory} does not exist; give the path of a HuggingFace checkpoint "
            "(a directory with config.json and *.safetensors)"
        )
    config = _read_json(directory / "config.json", "a HuggingFace checkpoint has one; is this the right directory?")
    architectures = config.get("architectures")
    if not isinstance(architectures, list) or not architectures or not isinstance(architectures[0], str):
        raise ModelError(
            f"{directory / 'config.json'} has no 'architectures'; it must name the model class, for example "
            '"architectures": ["Qwen2ForCausalLM"]'
        )
    text_config = config.get("text_config", config)
    if not isinstance(text_config, dict) or not isinstance(text_config.get("vocab_size"), int):
        raise ModelError(
            f"{directory / 'config.json'} has no 'vocab_size' (nor one under 'text_config'); add the number of rows of "
            "the embedding"
        )
    for part in (config, text_config):
        _check_dtype(directory / "config.json", part)
    generation = directory / "generation_config.json"
    sources = {directory / "config.json": config}
    if generation.is_file():
        sources[generation] = _read_json(generation, "")
    if not any("eos_token_id" in source for source in sources.values()):
        # Else nothing reads it: transformers writes defaults there that fit no small vocabulary.
        sources = {directory / "config.json": text_config}
    for file, source in sources.items():
        _check_end_tokens(file, source, text_config["vocab_size"])
    files = _tensor_files(directory) if needs_weights else {}
    for name, file in files.items():
        rows = _open(file).get_slice(name).get_shape()[0] if name.endswith((_EMBEDDING, _OUTPUT)) else None
        if rows not in (None, text_config["vocab_size"]):
            raise ModelError(
                f"{directory / 'config.json'} has vocab_size {text_config['vocab_size']}, but {name!r} in {file} has "
                f'{rows} rows; write "vocab_size": {rows}, or take the config.json that belongs to these weights'
            )
    return HFDirectory(path=directory, config=config, files=files)


def check_tied_output(directory: HFDirectory) -> None:
    """Check that a model whose config.json ties the output layer to the embedding has no other output layer in a file.

    Raises:
        ModelError: they differ, so training would drop one of them.
    """
    outputs, embeddings = ([name for name in directory.files if name.endswith(end)] for end in (_OUTPUT, _EMBEDDING))
    if len(outputs) != 1 or len(embeddings) != 1:
        return
    output, embedding = (_open(directory.files[name]).get_slice(name) for name in (outputs[0], embeddings[0]))
    rows = output.get_shape()[0]
    different = sum(
        int((output[start : start + 4096] != embedding[start : start + 4096]).any(1).sum())
        for start in range(0, rows, 4096)
    )
    if different:
        raise ModelError(
            f"{directory.path / 'config.json'} ties the output layer to the embedding (tie_word_embeddings), but "
            f"{outputs[0]!r} in {directory.files[outputs[0]]} differs from {embeddings[0]!r} in {different} of {rows} "
            'rows, and would be lost; write "tie_word_embeddings": false, or remove the tensor from the file'
        )


def _check_dtype(file: Path, config: Mapping[str, Any]) -> None:
    for key in ("dtype", "torch_dtype"):
        value = config.get(key)
        if value is not None and not isinstance(getattr(torch, str(value), None), torch.dtype):
            raise ModelError(
                f"{file} has {key} {value!r}, which is no dtype of tensors; write the dtype of the weights, "
                'for example "bfloat16"'
            )


def _check_end_tokens(file: Path, config: Mapping[str, Any], vocab_size: int) -> None:
    value = config.get("eos_token_id")
    for token in value if isinstance(value, list) else [] if value is None else [value]:
        if type(token) is not int:
            raise ModelError(
                f"{file} has eos_token_id {value!r}, where {token!r} is no whole number; give the id of the token in "
                "the vocabulary, or a list of ids"
            )
        if not 0 <= token < vocab_size:
            raise ModelError(
                f"{file} has eos_token_id {value!r}, but the vocabulary has the ids 0 to {vocab_size - 1} (vocab_size "
                "in config.json), so no answer would end; correct the id"
            )


def _tensor_files(directory: Path) -> dict[str, Path]:
    index_path = directory / _INDEX
    if index_path.exists():
        weight_map = _read_json(index_path, "").get("weight_map")
        if (
            not isinstance(weight_map, dict)
            or not weight_map
            or not all(isinstance(name, str) for name in weight_map.values())
        ):
            raise ModelError(f"{index_path} has no 'weight_map' from tensor names to file names; download it again")
        names = sorted(set(weight_map.values()))
        for name in names:
            if Path(name).name != name:
                raise ModelError(f"{index_path} names {name!r}, which is not in its own directory; download it again")
        missing = [name for name in names if not (directory / name).is_file()]
        if missing:
            raise ModelError(
                f"{index_path} names {len(missing)} file(s) that are not there, first {missing[0]!r}; "
                "complete the download"
            )
        for name in names:
            lost = {tensor for tensor, file in weight_map.items() if file == name} - tensor_names(directory / name)
            if lost:
                raise ModelError(
                    f"{index_path} says that {name!r} holds {len(lost)} tensor(s) that it does not, first "
                    f"{min(lost)!r}; download both again"
                )
        return {tensor: directory / name for tensor, name in weight_map.items()}
    if (directory / _SINGLE).is_file():
        return dict.fromkeys(tensor_names(directory / _SINGLE), directory / _SINGLE)
    raise ModelError(
        f"{directory} has neither {_SINGLE} nor {_INDEX}; only safetensors weights are read "
        "(convert older files with transformers' save_pretrained)"
    )


def tensor_names(path: Path) -> set[str]:
    """Return the names of the tensors in a safetensors file; raise `ModelError` unless its header fits the file."""
    return set(_open(path).keys())


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise ModelError(
            f"{path} is not a whole safetensors file ({path.stat().st_size} bytes; {error}); download it again"
        ) from None


def _read_json(path: Path, hint: str) -> dict[str, Any]:
    if not path.is_file():
        raise ModelError(f"{path} does not exist; {hint}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{path} is not valid JSON ({error}); download it again") from None
    if not isinstance(content, dict):
        raise ModelError(f"{path} holds a JSON {type(content).__name__}, not an object; download it again")
    return content
