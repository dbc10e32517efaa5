"""The weights of an earlier policy, kept in host memory and swapped in to compute its log probabilities."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from mbridge_train.engine.engine import Engine


class Snapshot:
    """A copy of this rank's weights as they are now. Swapping needs memory for one tensor, not for a second model."""

    def __init__(self, engine: Engine) -> None:
        engine.synchronize_weights()
        self._weights = [parameter.detach().to("cpu", copy=True) for parameter in _parameters(engine)]

    @contextmanager
    def swapped_in(self, engine: Engine) -> Iterator[None]:
        """Within the block the engine has the snapshot's weights; after it, bit for bit its own again."""
        engine.synchronize_weights()
        self._exchange(engine)
        try:
            yield
        finally:
            self._exchange(engine)

    @torch.no_grad()
    def _exchange(self, engine: Engine) -> None:
        for parameter, kept in zip(_parameters(engine), self._weights, strict=True):
            held = parameter.detach().to("cpu", copy=True)
            parameter.copy_(kept)
            kept.copy_(held)


def _parameters(engine: Engine) -> list[Tensor]:
    return [parameter for chunk in engine.model for parameter in chunk.parameters()]
