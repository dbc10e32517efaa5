"""Splitting a fused projection into rotated queries, rotated keys and values as one kernel each way.

In plain torch the forward pass copies the queries and rotates queries and keys, and the backward pass does the same and
concatenates; each operation reads and writes its tensors.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable


@triton.jit
def _rotation(angles, token, scale, channel, inside, CHANNELS: tl.constexpr, DTYPE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Cosine and sine of a token, rounded to the model's dtype."""
    angle = tl.load(angles + token * CHANNELS + channel, mask=inside, other=0)
    cosine = (tl.cos(angle) * scale).to(DTYPE).to(tl.float32)
    sine = (tl.sin(angle) * scale).to(DTYPE).to(tl.float32)
    return cosine, sine


@triton.jit
def _split(  # type: ignore[no-untyped-def]
    fused,
    bias,
    angles,
    query,
    key,
    value,
    scale,
    batch,
    HAS_BIAS: tl.constexpr,
    GROUPS: tl.constexpr,
    QUERIES: tl.constexpr,
    CHANNELS: tl.constexpr,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
):
    """All heads of one token: in each group its queries, then a key and a value."""
    token = tl.program_id(0).to(tl.int64)
    channel = tl.arange(0, HALF)[None, :]
    head = tl.arange(0, HEADS)[:, None]
    inside = channel < CHANNELS // 2
    cosine, sine = _rotation(angles, token // batch, scale, channel, inside, CHANNELS, fused.dtype.element_ty)
    for group in range(GROUPS):
        source = ((token * GROUPS + group) * (QUERIES + 2) + head) * CHANNELS + channel
        exists = (head < QUERIES + 2) & inside
        left = tl.load(fused + source, mask=exists).to(tl.float32)
        right = tl.load(fused + source + CHANNELS // 2, mask=exists).to(tl.float32)
        if HAS_BIAS:
            place = (group * (QUERIES + 2) + head) * CHANNELS + channel
            left += tl.load(bias + place, mask=exists).to(tl.float32)
            right += tl.load(bias + place + CHANNELS // 2, mask=exists).to(tl.float32)
        turned_left = tl.where(head <= QUERIES, left * cosine - right * sine, left)
        turned_right = tl.where(head <= QUERIES, right * cosine + left * sine, right)
        to_query = ((token * GROUPS + group) * QUERIES + head) * CHANNELS + channel
        tl.store(query + to_query, turned_left, mask=(head < QUERIES) & inside)
        tl.store(query + to_query + CHANNELS // 2, turned_right, mask=(head < QUERIES) & inside)
        to_rest = (token * GROUPS + group) * CHANNELS + channel + head * 0
        tl.store(key + to_rest, turned_left, mask=(head == QUERIES) & inside)
        tl.store(key + to_rest + CHANNELS // 2, turned_right, mask=(head == QUERIES) & inside)
        tl.store(value + to_rest, turned_left, mask=(head == QUERIES + 1) & inside)
        tl.store(value + to_rest + CHANNELS // 2, turned_right, mask=(head == QUERIES + 1) & inside)


@triton.jit
def _join(  # type: ignore[no-untyped-def]
    fused,
    angles,
    query,
    key,
    value,
    scale,
    batch,
    GROUPS: tl.constexpr,
    QUERIES: tl.constexpr,
    CHANNELS: tl.constexpr,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
):
    """The gradient of `_split`: join the parts, rotated back."""
    token = tl.program_id(0).to(tl.int64)
    channel = tl.arange(0, HALF)[None, :]
    head = tl.arange(0, HEADS)[:, None]
    inside = channel < CHANNELS // 2
    cosine, sine = _rotation(angles, token // batch, scale, channel, inside, CHANNELS, fused.dtype.element_ty)
    for group in range(GROUPS):
        of_query = ((token * GROUPS + group) * QUERIES + head) * CHANNELS + channel
        left = tl.load(query + of_query, mask=(head < QUERIES) & inside, other=0)
        right = tl.load(query + of_query + CHANNELS // 2, mask=(head < QUERIES) & inside, other=0)
        of_rest = (token * GROUPS + group) * CHANNELS + channel + head * 0
        left += tl.load(key + of_rest, mask=(head == QUERIES) & inside, other=0)
        right += tl.load(key + of_rest + CHANNELS // 2, mask=(head == QUERIES) & inside, other=0)
        left += tl.load(value + of_rest, mask=(head == QUERIES + 1) & inside, other=0)
        right += tl.load(value + of_rest + CHANNELS // 2, mask=(head == QUERIES + 1) & inside, other=0)
        left = left.to(tl.float32)
        right = right.to(tl.float32)
        turned_left = tl.where(head <= QUERIES, left * cosine + right * sine, left)
        turned_right = tl.where(head <= QUERIES, right * cosine - left * sine, right)
        target = ((token * GROUPS + group) * (QUERIES + 2) + head) * CHANNELS + channel
        exists = (head < QUERIES + 2) & inside
        tl.store(fused + target, turned_left, mask=exists)
        tl.store(fused + target + CHANNELS // 2, turned_right, mask=exists)


class SplitAndRotate(torch.autograd.Function):
    """Queries and keys with rotary positions (Su et al. 2021, eq. 34, channels paired as in GPT-NeoX), and values.

    `apply` takes

    * fused [sequence, batch, groups * (queries + 2) * channels] in float32 or half precision: of each group of heads
      its queries, its key and its value;
    * a bias to add to it, [groups * (queries + 2) * channels], or None;
    * angles, float32 [sequence, 1, 1, channels], whose second half repeats the first;
    * the number of groups, and the number of queries in each;
    * a factor of cosine and sine (YaRN's; else 1);

    and returns queries [sequence, batch, groups * queries, channels], keys and values [sequence, batch, groups,
    channels], contiguous. Cosine and sine are rounded to the dtype of `fused`, products and sums are not.
    """

    @staticmethod
    def forward(
        ctx: Any, fused: Tensor, bias: Tensor | None, angles: Tensor, groups: int, queries: int, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        angles = angles.contiguous()
        channels = angles.shape[-1]
        assert len(angles) >= len(fused) and fused.shape[-1] == groups * (queries + 2) * channels  # no kernel asks
        query = fused.new_empty(*fused.shape[:2], groups * queries, channels)
        key, value = (fused.new_empty(*fused.shape[:2], groups, channels) for _ in range(2))
        first = (fused.contiguous(), fused if bias is None else bias)
        _launch(_split, (*first, angles, query, key, value), scale, HAS_BIAS=bias is not None)
        ctx.save_for_backward(angles)
        ctx.scale, ctx.has_bias = scale, bias is not None
        return query, key, value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor | None, ...]:
        (angles,) = ctx.saved_tensors
        fused = query.new_empty(*query.shape[:2], (query.shape[2] + 2 * key.shape[2]) * query.shape[3])
        _launch(_join, (fused, angles, query.contiguous(), key.contiguous(), value.contiguous()), ctx.scale)
        return fused, fused.sum((0, 1)) if ctx.has_bias else None, None, None, None, None


def _launch(kernel: Any, tensors: tuple[Tensor, ...], scale: float, **flags: bool) -> None:
    """A program for each token; the last three tensors are queries, keys and values."""
    *_, query, key, _ = tensors
    sequence, batch, groups, channels = key.shape
    queries = query.shape[2] // groups
    if sequence * batch:
        kernel[(sequence * batch,)](
            *tensors,
            scale,
            batch,
            GROUPS=groups,
            QUERIES=queries,
            CHANNELS=channels,
            HEADS=triton.next_power_of_2(queries + 2),
            HALF=triton.next_power_of_2(channels // 2),
            **flags,
        )
