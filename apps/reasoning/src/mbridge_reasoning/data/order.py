"""The order in which problems are given out, as arithmetic: resuming needs two numbers and replays nothing."""

from collections.abc import Mapping

import numpy as np
from mbridge_train.data.errors import DataError


class ProblemSampler:
    """Gives out indices 0 … `size` - 1 in batches, epoch after epoch, each epoch in an order of its own.

    The order of epoch e depends on `(seed, e)` alone. A batch goes over the end of an epoch into the next one, so
    every index is given out once an epoch, whatever the batch size.
    """

    def __init__(self, size: int, *, batch_size: int, seed: int, shuffle: bool = True) -> None:
        if size < 1:
            raise DataError("there are no problems to sample from: the data set is empty")
        if batch_size < 1:
            raise DataError(f"data.rollout_batch_size is {batch_size}: set it to 1 or more")
        self.size = size
        self.batch_size = batch_size
        self.seed = seed
        self.shuffle = shuffle
        self.epoch = 0
        self.position = 0
        self._order = self._order_of(0)

    def next_batch(self) -> list[int]:
        """The next `batch_size` indices."""
        batch: list[int] = []
        while len(batch) < self.batch_size:
            if self.position == self.size:
                self.epoch, self.position = self.epoch + 1, 0
                self._order = self._order_of(self.epoch)
            taken = self._order[self.position : self.position + self.batch_size - len(batch)]
            self.position += len(taken)
            batch.extend(taken)
        return batch

    def state_dict(self) -> dict[str, int]:
        """What `load_state_dict` needs to go on from here: small integers, fit for JSON."""
        return {"epoch": self.epoch, "position": self.position, "size": self.size, "seed": self.seed}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Go on from `state`. Raises `DataError` if it belongs to other data or another order."""
        for name, setting in (("size", "the number of problems"), ("seed", "data.seed")):
            if state[name] != getattr(self, name):
                raise DataError(
                    f"cannot resume the data order: {setting} was {state[name]} when the checkpoint was saved and is "
                    f"{getattr(self, name)} now; use the data and settings of the first run, or start a new run"
                )
        self.epoch, self.position = state["epoch"], state["position"]
        self._order = self._order_of(self.epoch)

    def _order_of(self, epoch: int) -> list[int]:
        if not self.shuffle:
            return list(range(self.size))
        key = np.array([self.seed, epoch], dtype=np.uint64)
        order: list[int] = np.random.Generator(np.random.Philox(key=key)).permutation(self.size).tolist()
        return order
