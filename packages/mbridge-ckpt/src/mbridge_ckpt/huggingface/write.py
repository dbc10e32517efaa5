"""Write a HuggingFace model directory into a save: weights as they stream by, and the other files of the source.

Shards are written in the safetensors format, with no more memory than one shard.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mbridge_ckpt.errors import CheckpointError
from mbridge_ckpt.formats.tensors import SAFETENSORS_CODES, TensorRecord, dtype_name, tensor_bytes
from mbridge_ckpt.manifest.layout import HF_DIRECTORY
from mbridge_ckpt.store.checkpoint_writer import CheckpointWriter, FileSink

if TYPE_CHECKING:
    from torch import Tensor

_SIZE = re.compile(r"\s*([0-9]{1,18}(?:\.[0-9]{1,18})?)\s*([KMGT]?)(i?)B\s*", re.IGNORECASE)
# Weights in any format are what is written anew; hidden files are a download tool's or a version control's.
_WEIGHTS = re.compile(
    r".*\.(safetensors|bin|pt|pth|ckpt|gguf|h5|msgpack|onnx|onnx_data|ot|safetensors\.index\.json|bin\.index\.json)"
    r"|consolidated.*|.*\.index\.json\.lock"
)


def write_hf(
    save: CheckpointWriter,
    tensors: "Iterable[tuple[str, Tensor]]",
    source: str | Path | None,
    *,
    directory: str = HF_DIRECTORY,
    max_shard_size: int | str = "5GB",
) -> None:
    """Export to `directory` of the checkpoint being saved; call it on every rank of the save.

    Args:
        save: of `begin_save` or `AsyncSaver.begin_save`. Its first rank writes; the others only exhaust `tensors`,
            since a gathering iterator is collective. So does the first rank when its disk fails: `commit` then raises.
        tensors: (HuggingFace name, tensor on any device), each name once. Consumed one at a time.
        source: HuggingFace directory whose other files (config, tokenizer, chat template, generation and processor
            configuration, custom code) are copied; None to copy nothing. config.json gets the dtype of the tensors.
        max_shard_size: bytes, or text such as "5GB" or "512MiB". A larger tensor gets a shard of its own.

    Raises:
        CheckpointError: a name comes twice, a dtype is unknown to safetensors, the size cannot be read, or `source`
            is no directory, or a link in it leads nowhere.
    """
    limit = parse_size(max_shard_size)
    if not save.is_first:
        for _ in tensors:
            pass
        return
    files = other_files(Path(source)) if source is not None else []
    records = write_weights(save, tensors, limit, prefix=f"{directory}/")
    for path, file in files:
        copy_file(save, file, f"{directory}/{path}", records)


def write_weights(
    sink: FileSink, tensors: "Iterable[tuple[str, Tensor]]", limit: int, *, prefix: str = ""
) -> list[TensorRecord]:
    """Write shards of at most `limit` bytes, and an index if there are several; returns a record of each tensor."""
    shards: list[tuple[TensorRecord, ...]] = []
    total = 0
    for shard in _shards(sink, tensors, limit):
        shards.append(_write_shard(sink, f"{prefix}part-{len(shards):05d}", shard))
        total += sum(tensor.nbytes for tensor in shard.values())
        shard.clear()  # or it would live, by the loop's name, while the next one fills
    _name_shards(sink, prefix, shards, total)
    return [record for records in shards for record in records]


def is_weights(name: str) -> bool:
    """Return whether a file of this name holds weights, in any format, or the index of weights."""
    return _WEIGHTS.fullmatch(name) is not None


def other_files(source: Path) -> list[tuple[str, Path]]:
    """List every file of a HuggingFace directory that holds no weights: configuration, tokenizer, templates, code.

    Pairs of a path relative to `source` and the file; a download cache's links are followed. Raises CheckpointError if
    `source` is no directory or a link leads nowhere.
    """
    if not source.is_dir():
        raise CheckpointError(f"{source} is not a directory; give the HuggingFace directory the model came from")
    found = []
    for file in sorted(source.rglob("*")):
        relative = file.relative_to(source)
        hidden = any(part.startswith(".") or part == "__pycache__" for part in relative.parts)
        if hidden or file.is_dir() or is_weights(file.name):
            continue
        if not file.exists():
            raise CheckpointError(
                f"{file} is a link to {file.readlink()}, which is not there; download the model again"
            )
        if file.is_file():
            found.append((relative.as_posix(), file))
    return found


def copy_file(sink: FileSink, file: Path, path: str, records: list[TensorRecord]) -> None:
    """Copy `file` into the sink under `path`; a config.json with what it says of the tensors of `records` corrected.

    Engines convert tensors to its dtype, and dequantize them where it has a `quantization_config`.
    """
    if file.name == "config.json" and records:
        elements = Counter[str]()
        for record in records:
            elements[record.dtype] += math.prod(record.shape)
        try:
            config = json.loads(file.read_bytes())
        except ValueError:
            config = None  # not ours to judge
        described = _described(config, elements.most_common(1)[0][0]) if isinstance(config, dict) else config
        if described != config:
            with sink.stream(path) as stream:
                stream.write(json.dumps(described, indent=2).encode() + b"\n")
            return
    sink.copy(file, path)


def _described(config: dict[str, Any], dtype: str) -> dict[str, Any]:
    """Return the config.json of plain tensors of `dtype`, or such a part of one."""
    described: dict[str, Any] = {}
    for key, value in config.items():
        if key in ("dtype", "torch_dtype"):
            described[key] = dtype
        elif key != "quantization_config":
            is_part = key.endswith("_config") and isinstance(value, dict)
            described[key] = _described(value, dtype) if is_part else value
    return described


def parse_size(size: int | str) -> int:
    """Return the bytes of 5000, "5000B", "5GB" (10**9 each) or "5GiB" (2**30 each); raises CheckpointError."""
    if isinstance(size, int):
        count = size
    else:
        match = _SIZE.fullmatch(size)
        if not match:
            raise CheckpointError(f"max_shard_size {size!r} is no size; write bytes, or for example 5GB or 512MiB")
        base = 1024 if match[3] else 1000
        count = int(float(match[1]) * base ** " KMGT".index(match[2].upper() or " "))
    if count < 1:
        raise CheckpointError(f"max_shard_size {size!r} is not positive")
    return count


def _shards(sink: FileSink, tensors: "Iterable[tuple[str, Tensor]]", limit: int) -> "Iterator[dict[str, Tensor]]":
    shard: dict[str, Tensor] = {}
    seen: set[str] = set()
    size = 0
    for name, tensor in tensors:
        if name in seen:
            raise CheckpointError(f"{name}: the export gives this tensor twice")
        seen.add(name)
        if shard and size + tensor.nbytes > limit:
            yield shard
            shard, size = {}, 0
        # A copy, for the exporter may hand out a live parameter, or reuse its buffer for the next tensor.
        shard[name] = sink.host_copy(tensor)
        size += tensor.nbytes
        del tensor  # before the next one is asked for
    if shard:
        yield shard


def _write_shard(sink: FileSink, path: str, shard: "dict[str, Tensor]") -> tuple[TensorRecord, ...]:
    # Widest types first, so that every tensor begins at a multiple of its element size.
    names = sorted(shard, key=lambda name: (-shard[name].element_size(), name))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    records, position = [], 0
    for name in names:
        tensor = shard[name]
        dtype = dtype_name(tensor)
        if dtype not in SAFETENSORS_CODES:
            raise CheckpointError(f"{name}: safetensors has no dtype {dtype}; convert the tensor")
        end = position + tensor.nbytes
        header[name] = {"dtype": SAFETENSORS_CODES[dtype], "shape": list(tensor.shape), "data_offsets": [position, end]}
        records.append(TensorRecord(name, tuple(tensor.shape), dtype))
        position = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with sink.stream(path) as stream:
        stream.tensors = tuple(records)
        stream.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            stream.write(tensor_bytes(shard[name]))
    return tuple(records)


def _name_shards(sink: FileSink, prefix: str, shards: list[tuple[TensorRecord, ...]], total: int) -> None:
    """Give the shards their names, which hold the number of shards, and write the index if there is more than one."""
    if len(shards) == 1:
        sink.rename(f"{prefix}part-00000", f"{prefix}model.safetensors")
        return
    weight_map: dict[str, str] = {}
    for number, records in enumerate(shards):
        name = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        sink.rename(f"{prefix}part-{number:05d}", f"{prefix}{name}")
        weight_map |= {record.name: name for record in records}
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    sink.write_json(f"{prefix}model.safetensors.index.json", index)
