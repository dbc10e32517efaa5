"""Fused GPU kernels with their gradients, and the attention layer that uses them.

In: tensors, on a GPU for the kernels themselves. Out: the results of the plain torch or Megatron-Core code.

Uses: nothing of this package.
"""

import torch._dynamo.config


def runs_kernels(tensor: torch.Tensor) -> bool:
    """Return whether Triton's kernels can run on the tensor: on a GPU, unless compiling is disabled."""
    return tensor.is_cuda and not torch._dynamo.config.disable
