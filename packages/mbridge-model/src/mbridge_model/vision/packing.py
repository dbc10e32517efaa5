"""The vision tower's packed attention: patches of all images in one row, divided into frames or windows."""

from typing import Any

import torch
from torch import Tensor


def pack_frames(grid_thw: Tensor, device: torch.device) -> Any:
    """Describe the frames as packed sequences: each image, and each frame of a video, attends to itself.

    Args:
        grid_thw: int64 [items, 3], on the host.
        device: of the tower.

    Returns:
        Megatron-Core's `PackedSeqParams`.
    """
    return pack_segments(torch.repeat_interleave(grid_thw[:, 1] * grid_thw[:, 2], grid_thw[:, 0]), device)


def pack_segments(lengths: Tensor, device: torch.device) -> Any:
    """Describe segments of the given lengths, int [segments], as packed sequences. On the host, to avoid a sync."""
    from megatron.core.packed_seq_params import PackedSeqParams

    ends = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int().to(device)
    longest = int(lengths.max())
    return PackedSeqParams(
        qkv_format="thd", cu_seqlens_q=ends, cu_seqlens_kv=ends, max_seqlen_q=longest, max_seqlen_kv=longest
    )
