"""The few collectives a save needs, over torch.distributed where a process group exists and alone where none does."""

import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class Ranks:
    """The ranks that take part in a save or in a verification.

    `group` is a torch.distributed group, best a gloo one (objects then never pass through a GPU); None means the
    default group, or this process alone if torch.distributed is not initialized. `global_rank`, by which messages name
    this process, is by default its rank in the job.
    """

    def __init__(self, group: "ProcessGroup | None" = None, *, global_rank: int | None = None) -> None:
        # A process that never imported torch.distributed has no process group; importing it here would cost seconds.
        module: Any = sys.modules.get("torch.distributed")
        initialized = module is not None and module.is_available() and module.is_initialized()
        if group is not None and not initialized:
            raise ValueError("a process group was given but torch.distributed is not initialized")
        self._distributed: Any = module if initialized else None
        self._group = group
        self.rank, self.size, self.global_rank = 0, 1, 0
        if initialized:
            self.rank, self.size = module.get_rank(group), module.get_world_size(group)
            self.global_rank = module.get_rank()
        if global_rank is not None:
            self.global_rank = global_rank

    def gather(self, value: Any) -> list[Any]:
        """Return every rank's `value`, on every rank, in rank order."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        self._distributed.all_gather_object(values, value, group=self._group)
        return values

    def from_first(self, value: Any) -> Any:
        """Return the first rank's `value`, on every rank."""
        if self.size == 1:
            return value
        source = self._distributed.get_global_rank(self._group, 0) if self._group is not None else 0
        box = [value]
        self._distributed.broadcast_object_list(box, src=source, group=self._group)
        return box[0]
