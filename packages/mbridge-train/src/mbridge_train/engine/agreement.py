"""The check that all ranks were given the same global batch.

Every rank plans and collates on its own, so different batches would deadlock the ranks, or silently train on a sample
twice or never. One exchange of six numbers per pass between the CPUs detects this before anything runs.
"""

import zlib
from collections import Counter
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, distributed

from mbridge_train.engine.batch import Sample
from mbridge_train.errors import TrainError
from mbridge_train.layout import RankLayout

# What the entries of `_digest` are, in order.
_COMPARED = ("number of samples", "lengths", "tokens", "weights", "names of fields", "images")


def check_agreement(batch: Sequence[Sample], layout: RankLayout) -> None:
    """Compare the batch with those of all other ranks. Collective over all ranks.

    Checksums take about 50 ms of a CPU core per million tokens. Values of fields and pixels are left out, because a
    rank may have only those of its own samples. Raises `TrainError` on every rank, naming the ranks whose batch differs
    from that of the majority.
    """
    if distributed.get_world_size() == 1:
        return
    own = torch.tensor(_digest(batch))
    gathered = [torch.empty_like(own) for _ in range(distributed.get_world_size())]
    distributed.all_gather(gathered, own, group=layout.world_gloo)
    digests = [tuple(digest.tolist()) for digest in gathered]
    common, _ = Counter(digests).most_common(1)[0]
    different = {rank: digest for rank, digest in enumerate(digests) if digest != common}
    if not different:
        return
    named = []
    for rank, digest in different.items():
        parts = [name for name, mine, theirs in zip(_COMPARED, digest, common, strict=True) if mine != theirs]
        count = f" ({digest[0]}, not {common[0]})" if digest[0] != common[0] else ""
        named.append(f"rank {rank} in {', '.join(parts)}{count}")
    raise TrainError(
        f"the ranks were given different global batches: {'; '.join(named)}; give every rank the same samples in the "
        "same order (a data source, filter or random seed that depends on the rank is the usual cause)"
    )


def _digest(batch: Sequence[Sample]) -> list[int]:
    """Return a number for each of `_COMPARED`."""
    return [
        len(batch),
        _checksum([torch.tensor([sample.length for sample in batch])]),
        _checksum(sample.tokens for sample in batch),
        _checksum(sample.weights for sample in batch),
        zlib.crc32(repr([sorted(sample.fields) for sample in batch]).encode()),
        _checksum(sample.vision.grid_thw for sample in batch if sample.vision is not None),
    ]


def _checksum(tensors: Iterable[Tensor]) -> int:
    value = 0
    for tensor in tensors:
        value = zlib.crc32(tensor.contiguous().numpy(), value)
    return value
