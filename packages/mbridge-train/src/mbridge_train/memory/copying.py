"""Copying many tensors in few calls."""

from collections.abc import Iterable

import torch
from torch import Tensor

LARGE = 8 << 20
"""Bytes from which a tensor is copied alone: its copy takes longer than its launch, and would be slower in a group."""
GROUP_BYTES = 256 << 20
"""Bytes of smaller tensors that are copied by one call. Sources that are not views occupy at most this much."""


@torch.no_grad()
def copy_tensors(pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Copy the second tensor of each pair into the first, cast to its dtype.

    On a GPU, copying a model's small tensors one by one takes longer to launch than to run, so small sources are held
    until they add up to `GROUP_BYTES`.
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
