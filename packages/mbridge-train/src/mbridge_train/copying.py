"""Many tensors copied at once."""

from collections.abc import Iterable

import torch
from torch import Tensor

GROUP_BYTES = 512 << 20
"""Sources of one kernel. It is also what they may take, where they are not views of memory that is there anyway."""


@torch.no_grad()
def copy_tensors(pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Copy the second tensor of each pair into the first, cast to its dtype.

    On a GPU the copies of a model's tensors one by one take longer to launch than to run.

    Args:
        pairs: of equal shapes. Sources are held until `GROUP_BYTES` of them have come.
    """
    targets: list[Tensor] = []
    sources: list[Tensor] = []
    size = 0
    for target, source in pairs:
        targets.append(target)
        sources.append(source)
        size += source.nbytes
        if size >= GROUP_BYTES:
            torch._foreach_copy_(targets, sources)
            targets, sources, size = [], [], 0
    if targets:
        torch._foreach_copy_(targets, sources)
