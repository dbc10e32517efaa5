"""CPU equivalents of Megatron-Core functions in which more than a constant is CUDA's."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def get_rng_state(device: Any = "cuda", clone: bool = False, graph_safe: bool = False) -> Tensor:
    """State of the generator from which Megatron's "cuda" random numbers come: the CPU's."""
    if graph_safe:
        raise NotImplementedError("a random generator for CUDA graphs needs a GPU; set use_cudagraphable_rng to False")
    return torch.get_rng_state()


def set_rng_state(new_state: Tensor, device: Any = -1, graph_safe: bool = False) -> None:
    """Set the state of the CPU's generator, from which Megatron's "cuda" random numbers come."""
    if graph_safe:
        raise NotImplementedError("a random generator for CUDA graphs needs a GPU; set use_cudagraphable_rng to False")
    torch.set_rng_state(new_state)


def send_contiguous(communicate: Callable[..., Any]) -> Callable[..., Any]:
    """`P2PCommunicator._communicate` with contiguous copies of what it sends, where it is not contiguous."""

    @functools.wraps(communicate)
    def communicate_contiguous(
        self: Any, *, tensor_send_next: Tensor | None, tensor_send_prev: Tensor | None, **kwargs: Any
    ) -> Any:
        return communicate(
            self,
            tensor_send_next=None if tensor_send_next is None else tensor_send_next.contiguous(),
            tensor_send_prev=None if tensor_send_prev is None else tensor_send_prev.contiguous(),
            **kwargs,
        )

    return communicate_contiguous
