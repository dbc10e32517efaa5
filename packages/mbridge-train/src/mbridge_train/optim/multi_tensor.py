"""Norm and scaling of all gradients in one call where neither Transformer Engine nor Apex is installed.

Megatron-Core's substitutes for their kernels handle one gradient at a time and wait for the GPU after each norm.
These have the same interface and use torch's own kernels over lists of tensors.
"""

import torch
from mbridge_model.patches import Patch, PatchTable
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


_CLIP_GRADS = "megatron.core.optimizer.clip_grads"
MULTI_TENSOR = PatchTable(
    "clip all gradients at once",
    (
        Patch(
            target=f"{_CLIP_GRADS}:l2_norm_impl",
            reason="its substitute for a fused kernel waits for the GPU after each tensor",
            replacement=l2_norm,
        ),
        Patch(
            target=f"{_CLIP_GRADS}:multi_tensor_scale_impl",
            reason="its substitute for a fused kernel launches one kernel a tensor",
            replacement=scale,
        ),
    ),
)


def enable_multi_tensor() -> None:
    """Make Megatron-Core's clipping use them if it has no fused kernels. Idempotent."""
    from megatron.core import utils
    from megatron.core.optimizer import clip_grads

    if getattr(clip_grads, "l2_norm_impl", None) is utils.local_multi_tensor_l2_norm:
        MULTI_TENSOR.apply()
