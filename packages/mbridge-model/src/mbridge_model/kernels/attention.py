"""Which of torch's attention kernels run.

On GPUs since Hopper torch takes cuDNN's first. That plans each shape in about 0.15 s before it runs it for the first
time: nothing where all sequences have one length, more than half of a step where every micro-batch has another, and
in sampling, where each token makes the sequences longer, nearly all of the time.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

_CUDNN_FIRST = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]


def cudnn_attention_first() -> AbstractContextManager[Any]:
    """Within it `scaled_dot_product_attention` takes cuDNN's kernel if that can do what is asked."""
    return sdpa_kernel(_CUDNN_FIRST, set_priority=True)


@contextmanager
def no_cudnn_attention() -> Iterator[None]:
    """Within it `scaled_dot_product_attention` does not take cuDNN's kernel.

    The switch is torch's, of the process. To set an order of kernels would take twenty times as long, which is too long
    for each layer of a short micro-batch.
    """
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)
