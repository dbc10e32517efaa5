"""Offload weights, gradients and optimizer state while something else needs the GPU's memory.

Storages are emptied and refilled in place, so all views stay valid: a parameter and its slice of Megatron-Core's flat
buffer, `main_grad`, the optimizer's slices of fp32 weights. Megatron-Core's own helpers do less. Those of its
optimizers replace tensors by copies in pageable memory, after which slices of fp32 weights are no longer views of the
model; those of its buffers allocate pinned memory each time and wait for the GPU. Gradients are dropped, since the next
forward and backward pass begins with zeros.

On a GPU the copies run on a separate stream. Only the reuse of freed memory waits for a copy to the host, and only the
first work that needs a part waits for a copy to the GPU.
"""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from mbridge_train.errors import TrainError
from mbridge_train.memory.host_copy import HostCopy
from mbridge_train.optim.optimizer import Optimizer

KeptPart = Literal["weights", "optimizer"]
Part = KeptPart | Literal["gradients"]
KEPT: tuple[KeptPart, ...] = ("weights", "optimizer")
PARTS: tuple[Part, ...] = (*KEPT, "gradients")


class Offload:
    """The parts of an engine that are offloaded, and the host memory that holds them.

    Without an optimizer, an engine has only weights.
    """

    def __init__(self, model: Sequence[Any], optimizer: Optimizer | None, device: torch.device) -> None:
        self._model = model
        self._optimizer = optimizer
        stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._copies: dict[Part, HostCopy] = {part: HostCopy(device, stream) for part in PARTS}

    @property
    def away(self) -> frozenset[Part]:
        """The parts that are offloaded."""
        return frozenset(part for part, copy in self._copies.items() if copy.is_away)

    def offload(self, part: Part) -> None:
        """Offload a part as `Engine.offload` describes. Idempotent. No gather of weights may be in flight."""
        copy = self._copies[part]
        if copy.is_away:
            return
        try:
            # In fp32 the optimizer works on the weights themselves.
            stays = () if part == "weights" else self._tensors("weights")
            copy.take(self._tensors(part), excluding=stays, keeps_values=part != "gradients")
        except RuntimeError as error:
            raise TrainError(
                f"the {part} of this rank cannot be offloaded: {error}; leave them on the GPU, or give the process "
                "more host memory"
            ) from error

    def onload(self, part: Part) -> None:
        """Bring a part back as `Engine.onload` describes. Idempotent."""
        if self._copies[part].is_away:
            self._copies[part].give_back()

    def require(self, *parts: Part) -> None:
        """Make all work issued from now on wait until the parts are on the device; `TrainError` if one is offloaded."""
        for part in parts:
            if self._copies[part].is_away:
                remedy = "forward_backward" if part == "gradients" else f"onload({part!r})"
                raise TrainError(f"the {part} of this engine are offloaded: call Engine.{remedy} first")
            self._copies[part].wait()

    def _tensors(self, part: Part) -> list[Tensor]:
        if part == "weights":
            return [parameter for chunk in self._model for parameter in chunk.parameters()]
        if self._optimizer is None:
            return []
        if part == "optimizer":
            return self._optimizer.tensors()
        return [buffer.grad_data for chunk in self._model for buffer in chunk.buffers + chunk.expert_parallel_buffers]
