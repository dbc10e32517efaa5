"""Norm and scaling of all gradients in one call, where neither Transformer Engine nor Apex is installed.

Megatron-Core's substitutes for the fused kernels of these libraries handle one gradient at a time and wait for the GPU
after each norm. The functions here have the same interface and use torch's kernels over lists of tensors.
"""

import torch
from mbridge_model.patches import Patch, PatchTable
from torch import Tensor
from torch.nn.utils import get_total_norm


def l2_norm(chunk_size: int, overflow: Tensor, tensors: list[list[Tensor]], per_tensor: bool) -> tuple[Tensor, None]:
    """Return the L2 norm of all elements of the only list in `tensors`, as a tensor [1]."""
    return get_total_norm(tensors[0]).view(1), None


def scale(chunk_size: int, overflow: Tensor, tensors: list[list[Tensor]], factor: float) -> None:
    """Multiply gradients by `factor` in place. Megatron-Core passes their list twice, as source and as target."""
    _, gradients = tensors
    if gradients:
        torch._foreach_mul_(gradients, factor)


_CLIP_GRADS = "megatron.core.optimizer.clip_grads"
MULTI_TENSOR = PatchTable(
    "clip all gradients at once",
    Patch(
        target=f"{_CLIP_GRADS}:l2_norm_impl",
        reason="its substitute for a fused kernel waits for the GPU after each tensor",
        replacement=l2_norm,
    ),
    Patch(
        target=f"{_CLIP_GRADS}:multi_tensor_scale_impl",
        reason="its substitute for a fused kernel launches a kernel for each tensor",
        replacement=scale,
    ),
)


def enable_multi_tensor() -> None:
    """Make Megatron-Core's clipping use these functions if it has no fused kernels. Idempotent."""
    from megatron.core import utils
    from megatron.core.optimizer import clip_grads

    if getattr(clip_grads, "l2_norm_impl", None) is utils.local_multi_tensor_l2_norm:
        MULTI_TENSOR.apply()
