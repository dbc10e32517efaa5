"""Choose among torch's attention kernels.

On Hopper and later GPUs torch prefers cuDNN's kernel, which plans each new shape for about 0.15 s. That is negligible
where all sequences have one length, more than half of a step where every micro-batch has a new length, and nearly all
of the time in sampling, where each token lengthens the sequences.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

_CUDNN_FIRST = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def cudnn_attention_first() -> AbstractContextManager[Any]:
    """Make `scaled_dot_product_attention` prefer cuDNN's kernel in the block, wherever that kernel applies."""
    return sdpa_kernel(_CUDNN_FIRST, set_priority=True)


@contextmanager
def no_cudnn_attention() -> Iterator[None]:
    """Keep `scaled_dot_product_attention` from cuDNN's kernel in the block.

    The switch belongs to the process. Setting an order of kernels takes twenty times as long, too long for each layer
    of a short micro-batch.
    """
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)
