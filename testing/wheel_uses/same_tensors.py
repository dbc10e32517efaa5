"""Compare two HuggingFace directories tensor by tensor: `python same_tensors.py ONE OTHER`."""

import sys
from pathlib import Path

import torch
from safetensors.torch import load_file


def tensors(directory: str) -> dict[str, torch.Tensor]:
    """All tensors of the directory's files."""
    return {name: tensor for file in Path(directory).glob("*.safetensors") for name, tensor in load_file(file).items()}


one, other = map(tensors, sys.argv[1:])
assert one and one.keys() == other.keys(), one.keys() ^ other.keys()
assert all(torch.equal(one[name], other[name]) for name in one)
print(f"{len(one)} tensors, equal")
