"""Weights that another process can read where they are, in the parameters' own memory.

Where one rank has the whole model, what `export_blocks` yields are views of parameters. On a GPU the other process can
map their memory, which saves a copy through a bucket. Parameters on a CPU are private to their process, but for those
in shared memory.
"""

from collections.abc import Callable, Iterable, Iterator

import torch
from mbridge_model.bridge.hf_views import join_blocks
from torch import Tensor, nn

from mbridge_train.weight_buckets import Piece

PORTION = 64
"""Pieces in a message: few, so that the receiver copies some while the next ones are found; but messages take time."""


class WeightsInPlace:
    """Sorts the weights of a stream out that lie in memory of `model` which another process can map.

    Args:
        model: the chunks of this rank.
        larger_than: bytes of a storage that are too few: to map it would take longer than to copy it twice.
    """

    def __init__(self, model: Iterable[nn.Module], *, larger_than: int) -> None:
        storages = (parameter.untyped_storage() for chunk in model for parameter in chunk.parameters())
        large = {storage.data_ptr(): storage for storage in storages if storage.nbytes() > larger_than}
        memory = {start: _as_bytes(storage) for start, storage in large.items()}
        self._memory = {start: data for start, data in memory.items() if data.is_shared()}

    def take_out(
        self, weights: Iterable[tuple[str, list[Tensor]]], send: Callable[[list[Piece], Tensor], None]
    ) -> Iterator[tuple[str, Tensor]]:
        """Yield the weights that lie elsewhere.

        Args:
            weights: name and blocks of rows of each.
            send: gets the others, in portions, with their memory, uint8 [bytes]; that of a GPU may go through a
                connection once.
        """
        found: dict[int, list[Piece]] = {}
        for name, blocks in weights:
            start = self._start(blocks)
            if start is None:
                yield name, join_blocks(blocks)
                continue
            pieces = found.setdefault(start, [])
            pieces += _pieces(name, blocks, start)
            if len(pieces) >= PORTION:
                send(pieces, self._memory[start])
                del found[start]
        for start, pieces in found.items():
            send(pieces, self._memory[start])

    def _start(self, blocks: list[Tensor]) -> int | None:
        """Address of the memory that can be mapped in which all blocks lie."""
        starts = {block.untyped_storage().data_ptr() if block.is_contiguous() else None for block in blocks}
        start = starts.pop()
        return None if starts or start not in self._memory else start


def _as_bytes(storage: torch.UntypedStorage) -> Tensor:
    data = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
    # Sending a GPU's tensor puts a reference count around the memory of its storage, another one each time and for as
    # long as the storage lives: so it is a storage of this stream's own.
    return torch.from_dlpack(data) if data.is_cuda else data


def _pieces(name: str, blocks: list[Tensor], start: int) -> Iterator[Piece]:
    first = blocks[0]
    shape = (sum(len(block) for block in blocks), *first.shape[1:]) if len(blocks) > 1 else tuple(first.shape)
    done = 0
    for block in blocks:
        size = block.numel()
        yield Piece(name, shape, block.dtype, done, size, block.data_ptr() - start)
        done += size
