"""The gradient of RMSNorm as one kernel, also of the weight.

torch's kernels make a second pass over activations and gradients for the weight. Here each program accumulates the sum
of its rows, and only the sum over programs remains.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

_TILE = 2048
"""Elements that a program processes at a time, where rows are short."""
_PROGRAMS = 4
"""Programs per multiprocessor."""


@triton.jit
def _write_gradients(  # type: ignore[no-untyped-def]
    inputs,
    weight,
    inverse_root,
    output_gradient,
    gradient,
    weight_sums,
    rows,
    width,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Every n-th block of rows, and the sum of their weight's gradients."""
    column = tl.arange(0, COLUMNS)
    inside = column < width
    scale = tl.load(weight + column, mask=inside, other=0).to(tl.float32)[None, :]
    weight_sum = tl.zeros([COLUMNS], tl.float32)
    first = tl.program_id(0) * ROWS
    while first < rows:
        row = (first + tl.arange(0, ROWS))[:, None].to(tl.int64)
        exists = (row < rows) & inside[None, :]
        place = row * width + column[None, :]
        normalized = tl.load(inputs + place, mask=exists, other=0).to(tl.float32)
        outer = tl.load(output_gradient + place, mask=exists, other=0).to(tl.float32)
        inverse = tl.load(inverse_root + row, mask=row < rows, other=0)
        normalized *= inverse
        weight_sum += tl.sum(outer * normalized, axis=0)
        outer *= scale
        along = tl.sum(outer * normalized, axis=1)[:, None] / width
        tl.store(gradient + place, (outer - normalized * along) * inverse, mask=exists)
        first += tl.num_programs(0) * ROWS
    tl.store(weight_sums + tl.program_id(0) * width + column, weight_sum, mask=inside)


class RMSNorm(torch.autograd.Function):
    """x / sqrt(mean x^2 + epsilon) * weight over the last dimension (Zhang & Sennrich 2019, eq. 4), rounded once.

    `apply` takes hidden [..., width], the weight [width] and epsilon, and returns the shape and dtype of hidden.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        hidden = hidden.contiguous()
        output, inverse_root = torch._fused_rms_norm(hidden, list(weight.shape), weight, epsilon)
        ctx.save_for_backward(hidden, weight, inverse_root)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, output_gradient: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, inverse_root = ctx.saved_tensors
        width = len(weight)
        rows = hidden.numel() // width
        columns = triton.next_power_of_2(width)
        at_a_time = max(1, _TILE // columns)
        device = torch.cuda.get_device_properties(hidden.device) if hidden.is_cuda else None
        multiprocessors = device.multi_processor_count if device else 1
        programs = max(1, min(triton.cdiv(rows, at_a_time), _PROGRAMS * multiprocessors))
        gradient = torch.empty_like(hidden)
        weight_sums = hidden.new_empty(programs, width, dtype=torch.float32)
        _write_gradients[(programs,)](
            hidden,
            weight,
            inverse_root,
            output_gradient.contiguous(),
            gradient,
            weight_sums,
            rows,
            width,
            ROWS=at_a_time,
            COLUMNS=columns,
            num_warps=min(16, max(4, columns // 1024)),
        )
        return gradient, weight_sums.sum(0).to(weight.dtype), None
