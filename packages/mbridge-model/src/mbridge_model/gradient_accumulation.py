"""Weight gradients that a matrix product adds to the fp32 buffer itself.

Without it, each micro-batch writes a half-precision gradient of every weight and another kernel adds it to the buffer:
ten bytes of memory traffic a parameter. Transformer Engine's layers do it by themselves; Megatron-Core's ask for a
kernel of Apex, which no package index has. cuBLAS can add half-precision products to fp32, and torch calls it.
"""

from types import SimpleNamespace

import torch
from megatron.core.tensor_parallel import layers
from torch import Tensor


def accumulate_weight_gradient(inputs: Tensor, output_gradient: Tensor, main_grad: Tensor) -> None:
    """`main_grad` [out, in] += `output_gradient` [tokens, out]ᵀ · `inputs` [tokens, in], in place."""
    left = output_gradient.t()
    if main_grad.dtype == inputs.dtype:
        main_grad.addmm_(left, inputs)
    elif main_grad.is_cuda:
        torch.addmm(main_grad, left, inputs, out_dtype=main_grad.dtype, out=main_grad)
    else:
        main_grad.add_(left @ inputs)


def install_gradient_accumulation() -> None:
    """Serve what Megatron-Core would call of Apex, unless Apex is there. Again: no change."""
    if not layers._grad_accum_fusion_available:
        layers.fused_weight_gradient_mlp_cuda = SimpleNamespace(
            wgrad_gemm_accum_fp32=accumulate_weight_gradient, wgrad_gemm_accum_fp16=accumulate_weight_gradient
        )
        layers._grad_accum_fusion_available = True
