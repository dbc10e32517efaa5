"""Tensors of the host on their way to the device."""

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device | str) -> Tensor:
    """`tensor` on `device`, where a GPU gets it when it has done what was asked of it before.

    The host does not wait for that: a copy from pageable memory would make it, with nothing to do for the GPU in the
    time in which the next kernels are launched.
    """
    if tensor.device.type == "cpu" and torch.device(device).type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
