"""Fused GPU kernels with their gradients, and the attention layer that uses them.

In: tensors, on a GPU for the kernels themselves. Out: the results of the plain torch or Megatron-Core code.

Uses: nothing of this package.
"""
