"""The distributed optimizer's state, `distrib_optim.pt` (Megatron-Core's `DistributedOptimizer.save_parameter_state`).

For each gradient buffer (one per dtype of a model chunk's parameters) the file holds flat float32 tensors: the master
weights and the two moments of all its parameters, in reverse order. Each parameter begins at a multiple of 64 elements
within its bucket, and buckets follow one another without the padding at their ends. Before February 2024 nothing was
aligned, and each bucket was a separate tensor.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from math import ceil, prod
from typing import TYPE_CHECKING, Any

from mbridge_ckpt.errors import LayoutError
from mbridge_ckpt.formats.torch_pickle import StoredTensor
from mbridge_ckpt.formats.torch_reader import TorchFileReader
from mbridge_ckpt.formats.torch_zip import LazyTensor
from mbridge_ckpt.megatron_lm.optimizer_entries import FIX, MASTER, Entry, State, first_unlike
from mbridge_ckpt.megatron_lm.pickles import argument
from mbridge_ckpt.megatron_lm.tree import MegatronTree, Rank

if TYPE_CHECKING:
    from torch import Tensor

_FLAT_KEYS = {MASTER: "param", "exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq"}
_ALIGNMENTS = (64, 1)
_DEFAULT_BUCKET = 40_000_000


def from_buffers(tree: MegatronTree, rank: Rank, entries: list[Entry], flat: Any, reader: TorchFileReader) -> State:
    """Return the state of `entries`, all parameters of one optimizer, from its part `flat` of the open file.

    Raises LayoutError if no order of the parameters in the flat tensors fits their sizes and their weights.
    """
    buffers: dict[tuple[str, str], list[Entry]] = {}
    for entry in entries:
        buffers.setdefault((entry.stage.key, entry.weight.dtype), []).append(entry)
    stored = [value for key, value in flat.items() if isinstance(key, int)] if isinstance(flat, dict) else []
    if len(stored) != len(buffers):
        raise LayoutError(f"{reader.path}: {len(stored)} buffers, the parameters make {len(buffers)}; {FIX}")
    state: State = {}
    for number, (members, by_dtype) in enumerate(zip(buffers.values(), stored, strict=True)):
        where = f"{reader.path}: buffer {number}"
        world = next(iter(by_dtype.values())) if isinstance(by_dtype, dict) and len(by_dtype) == 1 else None
        if not isinstance(world, dict):
            raise LayoutError(f"{where} is of unknown form; {FIX}")
        segments = {kind: _segments(world.get(key), f"{where}: {key}") for kind, key in _FLAT_KEYS.items()}
        totals = {kind: sum(segment.shape[0] for segment in parts) for kind, parts in segments.items()}
        for offsets in _placings(members, totals, _bucket_sizes(tree, members)):
            found: State = {}
            for entry, offset in zip(members, offsets, strict=True):
                shape = entry.weight.shape
                found[entry.stage.key, entry.name] = {
                    kind: LazyTensor(shape, "float32", partial(_read_flat, reader, segments[kind], offset, shape))
                    for kind in _FLAT_KEYS
                }
            if first_unlike(tree, rank, members, found) is None:
                state |= found
                break
        else:
            raise LayoutError(
                f"{where}: {totals[MASTER]} elements in which no known order of the {len(members)} parameters finds"
                f" their weights again, for example {members[-1].name}; {FIX}"
            )
    return state


def _segments(value: Any, where: str) -> list[StoredTensor]:
    parts = value if isinstance(value, (list, tuple)) else [value]
    if not parts or not all(isinstance(part, StoredTensor) and len(part.shape) == 1 for part in parts):
        raise LayoutError(f"{where} is no flat tensor; {FIX}")
    return list(parts)


def _bucket_sizes(tree: MegatronTree, members: Sequence[Entry]) -> list[int | None]:
    """Return the bucket sizes that Megatron may have used; None is a single bucket."""
    data = argument(tree.arguments, "data_parallel_size", int) or 1
    data *= argument(tree.arguments, "context_parallel_size", int) or 1
    sizes: list[int | None] = [None, argument(tree.arguments, "ddp_bucket_size", int)]
    if count := argument(tree.arguments, "ddp_num_buckets", int):
        sizes.append(sum(entry.elements for entry in members) // count)
    return [*sizes, max(_DEFAULT_BUCKET, 1_000_000 * data)]


def _placings(
    members: Sequence[Entry], totals: dict[str, int], bucket_sizes: Sequence[int | None]
) -> Iterator[list[int]]:
    """Yield the possible offsets of the parameters that fill the flat tensors exactly."""
    seen = []
    for alignment in _ALIGNMENTS:
        for bucket_size in bucket_sizes:
            for shared_apart in (True, False):
                offsets, total = _placing(members, alignment, bucket_size, shared_apart)
                if set(totals.values()) == {total} and offsets not in seen:
                    seen.append(offsets)
                    yield offsets


def _placing(
    members: Sequence[Entry], alignment: int, bucket_size: int | None, shared_apart: bool
) -> tuple[list[int], int]:
    """Return offsets and total size in Megatron-Core's layout, without the padding at the ends of buckets."""
    offsets: list[int] = []
    bucket = end = 0  # where the bucket begins, and where its last parameter ends
    for entry in reversed(members):
        start = bucket + ceil((end - bucket) / alignment) * alignment
        apart = shared_apart and entry.is_shared_embedding
        if apart:
            bucket = start
        offsets.append(start)
        end = start + entry.elements
        if apart or (bucket_size is not None and end - bucket >= bucket_size):
            bucket = end
    return offsets[::-1], end


def _read_flat(reader: TorchFileReader, segments: list[StoredTensor], offset: int, shape: tuple[int, ...]) -> "Tensor":
    import torch

    pieces, begin, end = [], offset, offset + prod(shape)
    for segment in segments:
        size = segment.shape[0]
        if begin < size and end > 0:
            pieces.append(reader.read(segment, (max(begin, 0), min(end, size))))
        begin, end = begin - size, end - size
    flat = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
    return flat.float().view(shape)
