"""From a Megatron model to HuggingFace tensors, and to a HuggingFace directory."""

import json
import logging
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, distributed, nn

from mbridge_model.directory import HFDirectory
from mbridge_model.errors import ModelError
from mbridge_model.loading import ModelHandle

logger = logging.getLogger("mbridge_model")

# Everything else in a HuggingFace directory (tokenizer, chat template, custom code) is carried over as it is; so is
# config.json, but for what it says of the tensors.
_WEIGHT_SUFFIXES = (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json", ".pt", ".pth", ".gguf")


def export(model: list[nn.Module], handle: ModelHandle) -> Iterator[tuple[str, Tensor]]:
    """Stream the weights under their HuggingFace names, gathered from all ranks, one tensor at a time.

    Collective: every rank must run the iterator to its end, and every rank gets every tensor, on the model's device
    and in its dtype. At most one HuggingFace tensor and the shards it is made from exist beside the model. Padding
    rows of the vocabulary are cut off; tied embeddings come once, as in the source directory. A tensor may be
    a view of a parameter, which changes with it: copy a tensor that you keep.

    Args:
        model: the chunks that `load` returned, bare or wrapped (data parallel, half precision).
        handle: as `load` returned it.

    Raises:
        ModelError: the memory of the weights has been freed.
    """
    with torch.no_grad():
        yield from handle.bridge.export(model, handle.vocab_size)


def export_recipe(model: list[nn.Module], handle: ModelHandle) -> list[dict[str, Any]] | None:
    """Describe each HuggingFace tensor as a part of one Megatron parameter, for exporting later without Megatron.

    Collective over all ranks. Each entry has `name` (HuggingFace), `parameter` (Megatron's, layers numbered over the
    whole model) and `part`: "whole"; "query", "key" or "value" of a fused weight or bias, with `heads`, `groups` and
    `head_dim`; "gate" or "up" of a gated `linear_fc1`. `rows` are the real tokens of a padded vocabulary.

    Returns:
        The entries; None if some tensor is no such part (a permuted or computed one).
    """
    return handle.bridge.recipe(model, handle.provider, handle.vocab_size)


def save_hf(
    model: list[nn.Module], handle: ModelHandle, directory: str | Path, *, max_shard_bytes: int = 5 * 10**9
) -> None:
    """Write weights, config, tokenizer and all other files of the source directory. Collective over all ranks.

    config.json gets the dtype of the tensors that are written, and loses a `quantization_config`, since they are plain.
    The directory appears under its name only when it is complete: it is written under a temporary name and renamed.
    Rank 0 writes, holding at most one shard of the weights in host memory.

    Args:
        model, handle: as `load` returned them.
        directory: where to write; it must not exist, or be empty.
        max_shard_bytes: start a new safetensors file when the next tensor would make one larger than this.

    Raises:
        ModelError: on every rank, where `directory` holds something, or rank 0 cannot write (no space, no permission).
    """
    target = Path(directory)
    writes = distributed.get_rank() == 0
    # Rank 0 alone looks and writes, and the others learn of its failures: each rank must take part in every collective
    # of the export to its end, or the others wait for it forever.
    error: Exception | None = None
    if writes and target.exists() and (not target.is_dir() or any(target.iterdir())):
        error = ModelError(f"{target} exists and is not an empty directory; give another one or remove it")
    _raise_everywhere(error)
    tensors = export(model, handle)
    if writes:
        try:
            _write(tensors, handle.directory, target, max_shard_bytes)
        except (OSError, SafetensorError) as caught:
            error = ModelError(f"{target} cannot be written: {caught}; free space or give another directory")
            error.__cause__ = caught
    for _ in tensors:
        pass
    _raise_everywhere(error)


def _raise_everywhere(error: Exception | None) -> None:
    """Raise rank 0's error on every rank. Collective."""
    message = [None if error is None else str(error)]
    distributed.broadcast_object_list(message, src=0)
    if error is not None:
        raise error
    if message[0] is not None:
        raise ModelError(message[0])


def _write(tensors: Iterator[tuple[str, Tensor]], source: HFDirectory, target: Path, max_shard_bytes: int) -> None:
    """Write the directory under a temporary name and rename it to `target`; leave nothing behind on failure."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        dtype = _write_tensors(tensors, temporary, max_shard_bytes)
        for file in source.path.iterdir():
            if file.is_file() and not file.name.endswith(_WEIGHT_SUFFIXES):
                shutil.copy(file, temporary / file.name)
        config = _config_of_tensors(source.config, dtype)
        if config != source.config:
            (temporary / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        temporary.chmod(0o755)  # mkdtemp makes it private
        if target.exists():
            target.rmdir()
        os.rename(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _config_of_tensors(config: dict[str, Any], dtype: str) -> dict[str, Any]:
    """Return config.json for plain tensors of `dtype`: otherwise engines would convert them, or dequantize them."""
    changed: dict[str, Any] = {}
    for key, value in config.items():
        if key == "quantization_config":
            logger.info("config.json: quantization_config left out, since the exported tensors are plain %s", dtype)
        elif key in ("dtype", "torch_dtype"):
            changed[key] = dtype
        elif key.endswith("_config") and isinstance(value, dict):  # of the language model, of the vision tower
            changed[key] = _config_of_tensors(value, dtype)
        else:
            changed[key] = value
    return changed


def _write_tensors(tensors: Iterator[tuple[str, Tensor]], directory: Path, max_shard_bytes: int) -> str:
    """Write safetensors files of limited size, and their index if there are several; return the commonest dtype."""
    shard: dict[str, Tensor] = {}
    shards: list[list[str]] = []
    bytes_by_dtype: Counter[str] = Counter()

    def part(number: int) -> Path:
        # The final names hold the number of shards, which is known only at the end.
        return directory / f"part-{number:05d}"

    def flush() -> None:
        save_file(shard, part(len(shards)), metadata={"format": "pt"})
        shards.append(list(shard))
        shard.clear()

    held = 0  # bytes of `shard`
    for name, tensor in tensors:
        if shard and held + tensor.nbytes > max_shard_bytes:
            flush()
            held = 0
        held += tensor.nbytes
        # A copy, since the exporter may hand out a view of a live parameter or reuse its buffer.
        shard[name] = tensor.detach().to("cpu", copy=True).contiguous()
        bytes_by_dtype[str(tensor.dtype).removeprefix("torch.")] += tensor.nbytes
    flush()
    if len(shards) == 1:
        os.rename(part(0), directory / "model.safetensors")
    else:
        weight_map: dict[str, str] = {}
        for number, names in enumerate(shards):
            file_name = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
            os.rename(part(number), directory / file_name)
            weight_map |= dict.fromkeys(names, file_name)
        index = {"metadata": {"total_size": bytes_by_dtype.total()}, "weight_map": weight_map}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    return bytes_by_dtype.most_common(1)[0][0]
