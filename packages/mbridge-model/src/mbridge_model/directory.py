"""A HuggingFace model directory, checked before anything is built.

Only JSON files and the headers of safetensors files are read, so a mistake costs milliseconds, not a model load.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from mbridge_model.errors import ModelError

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"


@dataclass(frozen=True, kw_only=True, slots=True)
class HFDirectory:
    """A checked directory.

    Attributes:
        path: the directory.
        config: the content of config.json.
        weight_files: the safetensors files; empty where weights were not asked for.
    """

    path: Path
    config: dict[str, Any]
    weight_files: tuple[Path, ...]

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
    files = _weight_files(directory) if needs_weights else ()
    return HFDirectory(path=directory, config=config, weight_files=files)


def _weight_files(directory: Path) -> tuple[Path, ...]:
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
        return tuple(directory / name for name in names)
    if (directory / _SINGLE).is_file():
        tensor_names(directory / _SINGLE)
        return (directory / _SINGLE,)
    raise ModelError(
        f"{directory} has neither {_SINGLE} nor {_INDEX}; only safetensors weights are read "
        "(convert older files with transformers' save_pretrained)"
    )


def tensor_names(path: Path) -> set[str]:
    """Return the names of the tensors in a safetensors file, whose header must describe the whole file.

    Raises:
        ModelError: the file is cut short or too long, or its header is broken.
    """
    try:
        with safe_open(path, framework="numpy") as file:
            return set(file.keys())
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
