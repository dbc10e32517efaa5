"""The vision tower's packed attention: patches of all images in one row, divided into frames or windows."""

from typing import Any

import torch
from torch import Tensor


def pack_frames(grid_thw: Tensor, device: torch.device) -> Any:
    """Return the `PackedSeqParams` of `grid_thw`, int64 [items, 3]: each image, and each frame, attends to itself."""
    return pack_segments(torch.repeat_interleave(grid_thw[:, 1] * grid_thw[:, 2], grid_thw[:, 0]), device)


def pack_segments(lengths: Tensor, device: torch.device) -> Any:
    """Return the `PackedSeqParams` of segments of these lengths, int [segments] on the host, to avoid a sync."""
    from megatron.core.packed_seq_params import PackedSeqParams

    ends = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int().to(device)
    longest = int(lengths.max())
    return PackedSeqParams(
        qkv_format="thd", cu_seqlens_q=ends, cu_seqlens_kv=ends, max_seqlen_q=longest, max_seqlen_kv=longest
    )
