"""Elementwise functions as single GPU kernels.

A rotation or a softmax written in plain torch reads and writes its tensors once an operation. On a GPU torch.compile
makes one kernel of it; on a CPU it would need a C++ compiler and minutes, so there the function runs as it is written.
`TORCHDYNAMO_DISABLE=1`, torch's own switch, leaves it so on a GPU, too.
"""

from collections.abc import Callable
from functools import wraps

import torch
from torch import Tensor


def compiled_on_gpu[**P, R](function: Callable[P, R]) -> Callable[P, R]:
    """Compile `function` at its first call whose first argument is a CUDA tensor."""
    kernel = torch.compile(function)

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        first = args[0]
        return kernel(*args, **kwargs) if isinstance(first, Tensor) and first.is_cuda else function(*args, **kwargs)

    return call
