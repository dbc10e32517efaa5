"""Accumulate weight gradients directly in the fp32 buffer.

Without this, each micro-batch writes a half-precision gradient of every weight and another kernel adds it to the
buffer: ten bytes of memory traffic per parameter. Megatron-Core's layers need a kernel of Apex, which no package index
has, to do better; cuBLAS can add half-precision products to fp32, too, and torch exposes that.

The worst case are tied embeddings: a micro-batch uses few rows of the vocabulary, but all of them are written as zeros
twice and added three times.
"""

from types import SimpleNamespace
from typing import Any

import torch
from megatron.core.tensor_parallel import layers
from megatron.core.utils import unwrap_model
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from mbridge_model.patches.patch import Patch, PatchTable


def accumulate_weight_gradient(inputs: Tensor, output_gradient: Tensor, main_grad: Tensor) -> None:
    """`main_grad` [out, in] += `output_gradient` [tokens, out]ᵀ · `inputs` [tokens, in], in place."""
    left = output_gradient.t()
    if main_grad.dtype == inputs.dtype:
        main_grad.addmm_(left, inputs)
    elif main_grad.is_cuda:
        torch.addmm(main_grad, left, inputs, out_dtype=main_grad.dtype, out=main_grad)
    else:
        main_grad.add_(left @ inputs)


class AccumulatingEmbedding(torch.autograd.Function):
    """Rows of a weight, whose gradients are added to rows of `weight.main_grad`; the weight itself gets none.

    `apply` takes int64 tokens [...] and the weight [vocabulary, width], and returns [..., width].
    """

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, weight: Any) -> Tensor:
        ctx.save_for_backward(tokens)
        ctx.main_grad = weight.main_grad
        return torch.nn.functional.embedding(tokens, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None]:
        (tokens,) = ctx.saved_tensors
        rows = gradient.reshape(-1, gradient.shape[-1]).to(ctx.main_grad.dtype)
        # Not `index_put_`, which on a GPU takes equal tokens one after the other: those of padding, of images, and all
        # that other tensor-parallel ranks have.
        ctx.main_grad.index_add_(0, tokens.reshape(-1), rows)
        return None, None


def embedding(tokens: Tensor, weight: Any) -> Tensor:
    """Embed like torch, but accumulate the gradient if `mark_tied_embeddings` marked the weight and it has a buffer."""
    accumulates = getattr(weight, "accumulates_rows", False) and hasattr(weight, "main_grad")
    if accumulates and weight.requires_grad and torch.is_grad_enabled():
        return AccumulatingEmbedding.apply(tokens, weight)
    return torch.nn.functional.embedding(tokens, weight)


def mark_tied_embeddings(model: list[nn.Module]) -> None:
    """Make tied embeddings accumulate, where their output layer, which accumulates too, is on the same stage.

    Megatron-Core's data-parallel wrapper learns from that layer that the gradient is in the buffer. `zero_out_wgrad`
    would make the layer return a gradient of zeros for the embeddings' gradient to be added to.
    """
    for chunk in unwrap_model(model):
        language = getattr(chunk, "language_model", chunk)
        is_tied = getattr(language, "share_embeddings_and_output_weights", False)
        if is_tied and language.pre_process and language.post_process and not language.config.mtp_num_layers:
            weight = language.shared_embedding_or_output_weight()
            weight.accumulates_rows, weight.zero_out_wgrad = True, False


_LAYERS = "megatron.core.tensor_parallel.layers"
EMBEDDING_GRADIENTS = PatchTable(
    "add the gradients of tied embeddings to the fp32 buffer",
    Patch(
        target=f"{_LAYERS}:F",
        reason="torch's embedding writes a gradient of all rows of the vocabulary",
        replacement=SimpleNamespace(embedding=embedding),  # the only function of it that the module uses
    ),
)
WEIGHT_GRADIENTS = PatchTable(
    "add weight gradients to the fp32 buffer without Apex",
    Patch(
        target=f"{_LAYERS}:fused_weight_gradient_mlp_cuda",
        reason="the kernel is Apex's, which no package index has",
        replacement=SimpleNamespace(
            wgrad_gemm_accum_fp32=accumulate_weight_gradient, wgrad_gemm_accum_fp16=accumulate_weight_gradient
        ),
        adds=True,
    ),
    Patch(
        target=f"{_LAYERS}:_grad_accum_fusion_available",
        reason="it says that the kernel is missing",
        replacement=True,
    ),
)


def enable_gradient_accumulation() -> None:
    """Apply both tables, the second one unless Apex is installed. Idempotent."""
    EMBEDDING_GRADIENTS.apply()
    if not layers._grad_accum_fusion_available:
        WEIGHT_GRADIENTS.apply()
