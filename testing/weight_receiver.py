"""A process that takes in streams of weights, as a rollout engine's would. No Megatron: it starts in two seconds."""

import hashlib
import os
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor


def receive(
    connection: Connection, directory: Path, streams: int, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> None:
    """Take in `streams` streams and after each send names and `digest` back; end when the next one has begun.

    Args:
        connection: to the sender.
        directory: whose safetensors file says which tensors there are.
        device, dtype: of the tensors that are filled.
    """
    from mbridge_train.weight_stream import receive_weights

    shapes = {name: tensor.shape for name, tensor in load_file(directory / "model.safetensors").items()}
    targets = {name: torch.empty(shape, device=device, dtype=dtype) for name, shape in shapes.items()}
    for _ in range(streams):
        for target in targets.values():
            target.fill_(float("nan"))
        names = receive_weights(connection, targets, timeout=60)
        connection.send((names, digest(targets)))
    connection.recv()  # the memory, which comes first
    os._exit(3)


def digest(tensors: dict[str, Tensor]) -> dict[str, str]:
    """A hash of each tensor."""
    return {
        name: hashlib.sha256(tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy()).hexdigest()
        for name, tensor in tensors.items()
    }
