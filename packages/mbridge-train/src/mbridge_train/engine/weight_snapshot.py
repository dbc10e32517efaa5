"""Earlier weights in host memory, swapped in to compute log probabilities of an earlier policy."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

from mbridge_train.engine.engine import Engine
from mbridge_train.memory.host_copy import HostCopy


class Snapshot:
    """A copy of this rank's current weights. Swapping needs far less device memory than a second model."""

    def __init__(self, engine: Engine) -> None:
        engine.synchronize_weights()
        self._copy = HostCopy(engine.device)
        self._copy.save(_parameters(engine))

    @contextmanager
    def swapped_in(self, engine: Engine) -> Iterator[None]:
        """Swap the snapshot's weights in within the block, and the engine's own back, bit for bit, after it."""
        engine.synchronize_weights()
        self._copy.exchange(_parameters(engine))
        try:
            yield
        finally:
            self._copy.exchange(_parameters(engine))


def _parameters(engine: Engine) -> list[Tensor]:
    return [parameter for chunk in engine.model for parameter in chunk.parameters()]
