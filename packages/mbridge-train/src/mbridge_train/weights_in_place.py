"""Weights that another process can read where they are, in the parameters' own memory.

Where one rank has the whole model, most of what `export_weights` yields are views of parameters. On a GPU the other
process can map their memory, which saves a copy through a bucket. Parameters on a CPU are private to their process, but
for those in shared memory.
"""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from mbridge_train.weight_buckets import Piece


class WeightsInPlace:
    """Sorts the weights of a stream out that lie in memory of `model` which another process can map.

    Args:
        model: the chunks of this rank.
        larger_than: bytes of a storage that are too few: to map it would take longer than to copy it twice.
    """

    def __init__(self, model: Iterable[nn.Module], *, larger_than: int) -> None:
        storages = (tensor.untyped_storage() for chunk in model for tensor in chunk.parameters() if tensor.is_shared())
        shared = (storage for storage in storages if storage.nbytes() > larger_than)
        self._storages = {storage.data_ptr(): storage for storage in shared}
        self._pieces: dict[int, list[Piece]] = {}

    def take_out(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """Yield the weights that lie elsewhere, and keep where the others are for `pieces`."""
        for name, tensor in weights:
            start = tensor.untyped_storage().data_ptr()
            if start not in self._storages or not tensor.is_contiguous():
                yield name, tensor
                continue
            piece = Piece(
                name=name,
                shape=tuple(tensor.shape),
                dtype=tensor.dtype,
                start=0,
                size=tensor.numel(),
                offset=tensor.data_ptr() - start,
            )
            self._pieces.setdefault(start, []).append(piece)

    def pieces(self) -> Iterator[tuple[tuple[Piece, ...], Tensor]]:
        """Yield what was taken out, with its memory, uint8 [bytes], which may go through a connection once."""
        for start, pieces in self._pieces.items():
            storage = self._storages[start]
            data = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
            # Sending a GPU's tensor puts a reference count around the memory of its storage, another one each time and
            # for as long as the storage lives: so it is a storage of this stream's own.
            yield tuple(pieces), torch.from_dlpack(data) if data.is_cuda else data
