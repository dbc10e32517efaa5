"""Many tensors copied at once."""

from collections.abc import Iterable

import torch
from torch import Tensor

LARGE = 8 << 20
"""Bytes of a tensor whose copy takes longer than its launch. Alone it also is faster than as one of many."""
GROUP_BYTES = 256 << 20
"""Of smaller ones in one call. It is also what they may take, where they are not views of memory that is there."""


@torch.no_grad()
def copy_tensors(pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Copy the second tensor of each pair into the first, cast to its dtype.

    On a GPU the copies of a model's small tensors one by one take longer to launch than to run.

    Args:
        pairs: of equal shapes. Small sources are held until `GROUP_BYTES` of them have come.
    """
    targets: list[Tensor] = []
    sources: list[Tensor] = []
    held = 0
    for target, source in pairs:
        size = source.nbytes
        if size >= LARGE:
            target.copy_(source)
            continue
        targets.append(target)
        sources.append(source)
        held += size
        if held >= GROUP_BYTES:
            torch._foreach_copy_(targets, sources)
            targets, sources, held = [], [], 0
    if targets:
        torch._foreach_copy_(targets, sources)
