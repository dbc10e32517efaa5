"""Which of torch's attention kernels run.

On GPUs since Hopper torch takes cuDNN's first. That plans each shape in about 0.15 s before it runs it for the first
time: nothing where all sequences have one length, more than half of a step where every micro-batch has another, and
in sampling, where each token makes the sequences longer, nearly all of the time.
"""

from contextlib import AbstractContextManager
from typing import Any

from torch.nn.attention import SDPBackend, sdpa_kernel

_CUDNN_LAST = [
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.MATH,  # holds all scores in memory
]


def attention_kernels(*, plans: bool) -> AbstractContextManager[Any]:
    """Within it `scaled_dot_product_attention` takes the first of its kernels that can do what is asked.

    Args:
        plans: cuDNN's is the first, else nearly the last.
    """
    order = [SDPBackend.CUDNN_ATTENTION, *_CUDNN_LAST] if plans else _CUDNN_LAST  # repeated ones count once
    return sdpa_kernel(order, set_priority=True)
