"""Write a Megatron model as a HuggingFace directory."""

import json
import os
import shutil
import tempfile
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor, distributed, nn

from mbridge_model.errors import ModelError
from mbridge_model.model import ModelHandle, export

# Everything else in a HuggingFace directory (config, tokenizer, chat template, custom code) is carried over as it is.
_WEIGHT_SUFFIXES = (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json", ".pt", ".pth", ".gguf")


def save_hf(
    model: list[nn.Module], handle: ModelHandle, directory: str | Path, *, max_shard_bytes: int = 5 * 10**9
) -> None:
    """Write weights, config, tokenizer and whatever else the source directory holds. Collective over all ranks.

    The directory appears under its name only when it is complete: it is written beside it and renamed. Rank 0 writes,
    holding at most one shard of the weights in host memory.

    Args:
        model: the chunks that `load` returned.
        handle: as `load` returned it.
        directory: must not exist, or be empty.
        max_shard_bytes: start a new safetensors file when the next tensor would make one larger than this.

    Raises:
        ModelError: `directory` holds something.
    """
    target = Path(directory)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ModelError(f"{target} exists and is not an empty directory; give another one or remove it")
    if distributed.get_rank() != 0:
        for _ in export(model, handle):
            pass
        distributed.barrier()
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        writer = _ShardWriter(temporary, max_shard_bytes)
        for name, tensor in export(model, handle):
            writer.add(name, tensor)
        writer.finish()
        for file in handle.directory.path.iterdir():
            if file.is_file() and not file.name.endswith(_WEIGHT_SUFFIXES):
                shutil.copy(file, temporary / file.name)
        temporary.chmod(0o755)  # mkdtemp makes it private
        if target.exists():
            target.rmdir()
        os.rename(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    distributed.barrier()


class _ShardWriter:
    """Collects tensors into safetensors files of a limited size, and writes the index if there is more than one."""

    def __init__(self, directory: Path, max_shard_bytes: int) -> None:
        self.directory = directory
        self.max_shard_bytes = max_shard_bytes
        self.shard: dict[str, Tensor] = {}
        self.shard_bytes = 0
        self.shards: list[list[str]] = []
        self.total_bytes = 0

    def add(self, name: str, tensor: Tensor) -> None:
        if self.shard and self.shard_bytes + tensor.nbytes > self.max_shard_bytes:
            self._flush()
        # A copy, since the exporter may hand out a view of a live parameter or reuse its buffer.
        self.shard[name] = tensor.detach().to("cpu", copy=True).contiguous()
        self.shard_bytes += tensor.nbytes

    def finish(self) -> None:
        self._flush()
        count = len(self.shards)
        if count == 1:
            os.rename(self._part(0), self.directory / "model.safetensors")
            return
        weight_map = {}
        for number, names in enumerate(self.shards):
            file_name = f"model-{number + 1:05d}-of-{count:05d}.safetensors"
            os.rename(self._part(number), self.directory / file_name)
            weight_map |= dict.fromkeys(names, file_name)
        index = {"metadata": {"total_size": self.total_bytes}, "weight_map": weight_map}
        (self.directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")

    def _flush(self) -> None:
        save_file(self.shard, self._part(len(self.shards)), metadata={"format": "pt"})
        self.shards.append(list(self.shard))
        self.total_bytes += self.shard_bytes
        self.shard, self.shard_bytes = {}, 0

    def _part(self, number: int) -> Path:
        # The final names hold the number of shards, which is known only at the end.
        return self.directory / f"part-{number:05d}"
