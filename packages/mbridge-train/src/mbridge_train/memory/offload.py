"""Weights, gradients and optimizer state out of a GPU's memory while something else needs it.

Storages are emptied and filled again, so that all views stay valid: a parameter and its slice of Megatron-Core's flat
buffer, `main_grad`, the optimizer's slices of fp32 weights. Megatron-Core's own helpers do less: those of its
optimizers replace tensors by copies in pageable memory, after which slices of fp32 weights are no longer the model's;
those of its buffers pin memory on the way and wait for the GPU. What they do with gradients is done here, too: they
are dropped, as the next forward and backward pass begins with zeros.

On a GPU the copies run on a stream of their own. Only the reuse of the freed memory waits for a copy to the host, and
only the first work that needs a part for a copy to the GPU.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from mbridge_train.errors import TrainError
from mbridge_train.memory.host_copy import HostCopy
from mbridge_train.optim.optimizer import Optimizer

if TYPE_CHECKING:
    from mbridge_train.engine.engine import Engine

KeptPart = Literal["weights", "optimizer"]
Part = KeptPart | Literal["gradients"]
KEPT: tuple[KeptPart, ...] = ("weights", "optimizer")
PARTS: tuple[Part, ...] = (*KEPT, "gradients")


class Offload:
    """What of an engine is not on its device.

    Args:
        model: its chunks, wrapped for data parallelism if they are trained.
        optimizer: None for an engine that only evaluates, which has weights alone.
        device: of the model.
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
        """See `Engine.offload`; no gather of weights may be under way. Offloaded already: nothing happens."""
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
        """See `Engine.onload`. There already: nothing happens."""
        if self._copies[part].is_away:
            self._copies[part].give_back()

    def require(self, *parts: Part) -> None:
        """Let the work that is issued from now on find the parts on the device.

        Raises:
            TrainError: one of them is offloaded.
        """
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


@contextmanager
def onloaded(engine: "Engine") -> Iterator[None]:
    """Within the block weights and optimizer are on the device; after it what was offloaded is offloaded again."""
    away = engine.memory.away
    engine.onload()
    engine.memory.require(*KEPT)
    try:
        yield
    finally:
        engine.offload(*away)
