"""Weight gradients that go to the fp32 buffer at once.

Without it, each micro-batch writes a half-precision gradient of every weight and another kernel adds it to the buffer:
ten bytes of memory traffic a parameter. Transformer Engine's layers do it by themselves; Megatron-Core's ask for a
kernel of Apex, which no package index has. cuBLAS can add half-precision products to fp32, and torch calls it.

The gradient of embeddings that are also the output layer's weight is the worst case: all rows of the vocabulary, of
which a micro-batch has few, are written as zeros, twice, and added up three times.
"""

from types import SimpleNamespace
from typing import Any

import torch
from megatron.core.tensor_parallel import layers
from torch import Tensor
from torch.autograd.function import once_differentiable


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
        ctx.main_grad.index_put_((tokens.reshape(-1),), rows, accumulate=True)
        return None, None


def embedding(tokens: Tensor, weight: Any) -> Tensor:
    """torch's `embedding`, accumulating where the weight is tied to an output layer that accumulates, too.

    That output layer then tells Megatron-Core's wrapper that the gradient is in the buffer, also for the embedding,
    whose gradient is there by then: the wrapper's hook comes after both.
    """
    ties = getattr(weight, "zero_out_wgrad", None)  # Megatron-Core's mark of weights that one stage uses twice
    if ties is None or not hasattr(weight, "main_grad") or not (weight.requires_grad and torch.is_grad_enabled()):
        return torch.nn.functional.embedding(tokens, weight)
    weight.zero_out_wgrad = False  # with it the output layer makes a gradient of zeros, for the embedding's to be added
    return AccumulatingEmbedding.apply(tokens, weight)


def install_gradient_accumulation() -> None:
    """Serve what Megatron-Core would call of Apex, unless Apex is there, and of torch. Again: no change."""
    layers.F = SimpleNamespace(embedding=embedding)  # of which it uses nothing else
    if not layers._grad_accum_fusion_available:
        layers.fused_weight_gradient_mlp_cuda = SimpleNamespace(
            wgrad_gemm_accum_fp32=accumulate_weight_gradient, wgrad_gemm_accum_fp16=accumulate_weight_gradient
        )
        layers._grad_accum_fusion_available = True
