"""SwiGLU as one kernel each way, for any number of tokens.

For changing shapes, as in packed batches, torch.compile's kernels reach half and a third of the memory bandwidth (see
docs/performance-log.md). Megatron-Core keeps gate and value in one tensor, while the kernels of libraries take two.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_COLUMNS = 1024


@triton.jit
def _write_output(inputs, output, width, COLUMNS: tl.constexpr):  # type: ignore[no-untyped-def]
    """A block of columns of one row."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < width
    first = row * 2 * width + column
    gate = tl.load(inputs + first, mask=inside).to(tl.float32)
    value = tl.load(inputs + first + width, mask=inside).to(tl.float32)
    tl.store(output + row * width + column, gate * value / (1 + tl.exp(-gate)), mask=inside)


@triton.jit
def _write_gradient(inputs, output_gradient, gradient, width, COLUMNS: tl.constexpr):  # type: ignore[no-untyped-def]
    """A block of columns of one row, of both halves."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < width
    first = row * 2 * width + column
    outer = tl.load(output_gradient + row * width + column, mask=inside).to(tl.float32)
    gate = tl.load(inputs + first, mask=inside).to(tl.float32)
    value = tl.load(inputs + first + width, mask=inside).to(tl.float32)
    sigmoid = 1 / (1 + tl.exp(-gate))
    tl.store(gradient + first, outer * value * sigmoid * (1 + gate * (1 - sigmoid)), mask=inside)
    tl.store(gradient + first + width, outer * gate * sigmoid, mask=inside)


class SwiGLU(torch.autograd.Function):
    """silu(gate) * value (Shazeer 2020, eq. 6), computed in float32 and rounded once.

    `apply` takes [tokens, 2 * width], first the gates, then the values, in float32 or half precision, and returns
    [tokens, width].
    """

    @staticmethod
    def forward(ctx: Any, inputs: Tensor) -> Tensor:
        inputs = inputs.contiguous()
        ctx.save_for_backward(inputs)
        output = inputs.new_empty(inputs.shape[0], inputs.shape[1] // 2)
        _launch(_write_output, output.shape, inputs, output)
        return output

    @staticmethod
    def backward(ctx: Any, output_gradient: Tensor) -> Tensor:
        (inputs,) = ctx.saved_tensors
        gradient = torch.empty_like(inputs)
        _launch(_write_gradient, output_gradient.shape, inputs, output_gradient.contiguous(), gradient)
        return gradient


def _launch(kernel: Any, shape: torch.Size, *tensors: Tensor) -> None:
    tokens, width = shape
    if tokens:
        kernel[(tokens, triton.cdiv(width, _COLUMNS))](*tensors, width, COLUMNS=_COLUMNS)
