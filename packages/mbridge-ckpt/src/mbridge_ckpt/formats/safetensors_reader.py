"""Read the tensors of a safetensors file one after another, with the memory of one.

The safetensors library maps the file, so that all that was read of it counts as memory of the process.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from mbridge_ckpt.errors import CorruptCheckpointError
from mbridge_ckpt.formats.safetensors_header import read_safetensors_header

if TYPE_CHECKING:
    from torch import Tensor


def read_safetensors(path: Path) -> "Iterator[tuple[str, Tensor]]":
    """(name, CPU tensor) in the order of the data; raises as `read_safetensors_header` does."""
    import torch

    records = read_safetensors_header(path)
    with path.open("rb", buffering=0) as stream:
        stream.seek(8 + int.from_bytes(stream.read(8), "little"))
        for record in records:
            tensor = torch.empty(record.shape, dtype=getattr(torch, record.dtype))
            if tensor.numel():
                rest = memoryview(tensor.reshape(-1).view(torch.uint8).numpy())
                while len(rest):
                    count = stream.readinto(rest)
                    if not count:
                        raise CorruptCheckpointError(f"{path}: ends within {record.name}")
                    rest = rest[count:]
            yield record.name, tensor
            del tensor  # before the next one is made
