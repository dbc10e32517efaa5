"""Norm and scaling of all gradients in one call where neither Transformer Engine nor Apex is installed.

Megatron-Core's substitutes for their kernels handle one gradient at a time and wait for the GPU after each norm.
These have the same interface and use torch's own kernels over lists of tensors.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm


def l2_norm(chunk_size: int, overflow: Tensor, tensors: list[list[Tensor]], per_tensor: bool) -> tuple[Tensor, None]:
    """Return [1], the norm of all elements of the only list in `tensors`."""
    return get_total_norm(tensors[0]).view(1), None


def scale(chunk_size: int, overflow: Tensor, tensors: list[list[Tensor]], factor: float) -> None:
    """Multiply in place; Megatron-Core passes the list of gradients twice, as source and as target."""
    _, gradients = tensors
    if gradients:
        torch._foreach_mul_(gradients, factor)


def install_multi_tensor() -> None:
    """Make Megatron-Core's clipping use these functions if it has no kernels; idempotent."""
    from megatron.core import utils
    from megatron.core.optimizer import clip_grads

    module: Any = clip_grads
    if module.l2_norm_impl is utils.local_multi_tensor_l2_norm:
        module.l2_norm_impl, module.multi_tensor_scale_impl = l2_norm, scale
