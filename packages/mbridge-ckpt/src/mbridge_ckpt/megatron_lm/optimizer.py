"""Find each parameter's optimizer state in the files of a Megatron-LM rank, which do not name it.

The mapping is inferred from the order of the model's parameters, and the master weights prove it: rounded to the dtype
of the model they must equal the weights. A state that cannot be mapped with certainty is refused.

The distributed optimizer's state is in `distrib_optim.pt` (`DistributedOptimizer.save_parameter_state` of
Megatron-Core). For each gradient buffer (one per dtype of a model chunk's parameters) it holds flat float32 tensors:
the master weights and the two moments of all its parameters, in reverse order. Each parameter begins at a multiple of
64 elements within its bucket, and buckets follow one another without the padding at their ends. Before February 2024
nothing was aligned, and each bucket was a separate tensor.

The plain optimizer's state is in `model_optim_rng.pt`: moments by index, counted through the parameter groups, each in
the order of the model. The float32 master weights of bfloat16 and float16 models are stored by group; those of a
float32 model are its weights, so that only counts, order and shapes support the mapping.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from math import ceil, prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mbridge_ckpt.errors import LayoutError
from mbridge_ckpt.formats.torch_pickle import StoredTensor, map_tensors
from mbridge_ckpt.formats.torch_reader import TorchFileReader
from mbridge_ckpt.formats.torch_zip import LazyTensor
from mbridge_ckpt.megatron_lm.names import EMBEDDING, OUTPUT_LAYER
from mbridge_ckpt.megatron_lm.pickles import argument
from mbridge_ckpt.megatron_lm.tree import OPTIMIZER_FILE, MegatronTree, ModelStage, Rank
from mbridge_ckpt.store.whole_model import MASTER, MOMENTS

if TYPE_CHECKING:
    from torch import Tensor

FLAT_KEYS = {MASTER: "param", "exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq"}
"""Megatron-Core's name for each kind of the distributed optimizer's flat state."""
_FIX = "import the weights alone with --no-optimizer"
_ALIGNMENTS = (64, 1)
_DEFAULT_BUCKET = 40_000_000

State = dict[tuple[str, str], dict[str, LazyTensor]]
"""By (key of the stage, name in the file): master weight and moments in float32 and in the parameter's shape."""


@dataclass(frozen=True, slots=True)
class RankOptimizer:
    """A rank's optimizer state, Adam's step count, and the state of the fp16 loss scaler if there is one."""

    state: State
    step: int
    grad_scaler: dict[str, Any] | None


@dataclass(frozen=True, slots=True)
class _Entry:
    """A parameter as the optimizer numbers it: where its weight lies, and whether it belongs to an expert."""

    stage: ModelStage
    name: str
    weight: StoredTensor
    is_expert: bool
    is_shared_embedding: bool

    @property
    def key(self) -> tuple[str, str]:
        return self.stage.key, self.name

    @property
    def elements(self) -> int:
        return prod(self.weight.shape)


def read_optimizer(tree: MegatronTree, rank: Rank, *, tied: bool) -> RankOptimizer:
    """Map a rank's optimizer state to its parameters, and compare the master weights with the weights.

    `tied`: the last stage's output layer is a copy of the embedding. Reads each master weight once; memory is two
    tensors. Raises LayoutError if the state is missing or cannot be mapped, naming the file.
    """
    path = tree.path(rank)
    saved = tree.content(rank).get("optimizer")
    if saved is None:
        raise LayoutError(f"{path}: holds no optimizer state; {_FIX}")
    parts = saved if isinstance(saved, list) else [saved]
    if not all(isinstance(part, dict) for part in parts) or len(parts) > 2:
        raise LayoutError(f"{path}: the optimizer has {len(parts)} parts of unknown form; {_FIX}")
    entries = list(_entries(tree, rank, tied))
    # A second optimizer is that of experts, which have separate data-parallel groups.
    shares = [entries] if len(parts) == 1 else [[e for e in entries if e.is_expert is flag] for flag in (False, True)]
    state: State = {}
    if (path.parent / OPTIMIZER_FILE).exists():
        reader = tree.reader(path.parent / OPTIMIZER_FILE)
        flat_parts = reader.value if isinstance(reader.value, list) else [reader.value]
        if len(flat_parts) != len(parts):
            raise LayoutError(
                f"{reader.path}: state of {len(flat_parts)} optimizers, {path.name} has {len(parts)}; {_FIX}"
            )
        for share, flat in zip(shares, flat_parts, strict=True):
            if flat is not None:  # None: it is in the file of the first expert rank
                state |= _from_buffers(tree, rank, share, flat, reader)
    else:
        for share, part in zip(shares, parts, strict=True):
            state |= _from_groups(tree, rank, share, part)
    missing = [e.name for e in entries if e.key not in state and (e.is_expert or rank[2] == 0)]
    if missing:
        raise LayoutError(f"{path.parent}: no optimizer state of {missing[0]}; {_FIX}")
    scaler = parts[0].get("grad_scaler")
    grad_scaler = map_tensors(scaler, tree.reader(path).read) if isinstance(scaler, dict) else None
    return RankOptimizer(state, _step(tree, path, parts), grad_scaler)


def _entries(tree: MegatronTree, rank: Rank, tied: bool) -> Iterator[_Entry]:
    ends = {(tree.stages[0].key, EMBEDDING), (tree.stages[-1].key, OUTPUT_LAYER)}
    for stage in tree.stages:
        if stage.pipeline_rank != rank[1]:
            continue
        weights = tree.weights(stage, rank[0], rank[2])
        for parameter in stage.parameters:
            if parameter.cut != "buffer":
                shared = tied and len(tree.stages) > 1 and (stage.key, parameter.name) in ends
                yield _Entry(stage, parameter.name, weights[parameter.name], parameter.expert is not None, shared)


def _step(tree: MegatronTree, path: Path, parts: list[dict[str, Any]]) -> int:
    """Return Adam's step count, kept by group (Transformer Engine, Apex) or by parameter (torch)."""
    reader, found = tree.reader(path), set()
    for part in parts:
        inner = part["optimizer"] if isinstance(part.get("optimizer"), dict) else part
        moments = inner.get("state")
        holders = list(inner.get("param_groups") or [])
        holders += list(moments.values()) if isinstance(moments, dict) else []
        for holder in holders:
            value = holder.get("step") if isinstance(holder, dict) and holder.get("params", True) else None
            value = reader.read(value).item() if isinstance(value, StoredTensor) and value.shape == () else value
            if isinstance(value, (int, float)) and float(value).is_integer():
                found.add(int(value))
    if len(found) != 1:
        raise LayoutError(f"{path}: Adam's step counts are {sorted(found)}, expected one; {_FIX}")
    return found.pop()


def _proves(tree: MegatronTree, rank: Rank, entries: Sequence[_Entry], state: State) -> bool:
    """Return whether each master weight, rounded to the model's dtype, is its weight."""
    import torch

    for entry in entries:
        weight = tree.read(entry.stage, entry.name, rank[0], rank[2])
        if not torch.equal(state[entry.key][MASTER].read().to(weight.dtype), weight):
            return False
    return True


def _from_buffers(tree: MegatronTree, rank: Rank, entries: list[_Entry], flat: Any, reader: TorchFileReader) -> State:
    """Return the state of `entries`, all parameters of one distributed optimizer, from its part `flat` of the file."""
    buffers: dict[tuple[str, str], list[_Entry]] = {}
    for entry in entries:
        buffers.setdefault((entry.stage.key, entry.weight.dtype), []).append(entry)
    stored = [value for key, value in flat.items() if isinstance(key, int)] if isinstance(flat, dict) else []
    if len(stored) != len(buffers):
        raise LayoutError(f"{reader.path}: {len(stored)} buffers, the parameters make {len(buffers)}; {_FIX}")
    state: State = {}
    for number, (members, by_dtype) in enumerate(zip(buffers.values(), stored, strict=True)):
        where = f"{reader.path}: buffer {number}"
        world = next(iter(by_dtype.values())) if isinstance(by_dtype, dict) and len(by_dtype) == 1 else None
        if not isinstance(world, dict):
            raise LayoutError(f"{where} is of unknown form; {_FIX}")
        segments = {kind: _segments(world.get(key), f"{where}: {key}") for kind, key in FLAT_KEYS.items()}
        totals = {kind: sum(segment.shape[0] for segment in parts) for kind, parts in segments.items()}
        for offsets in _offsets(tree, members, totals):
            found: State = {}
            for entry, offset in zip(members, offsets, strict=True):
                shape = entry.weight.shape
                found[entry.key] = {
                    kind: LazyTensor(shape, "float32", partial(_read_flat, reader, segments[kind], offset, shape))
                    for kind in FLAT_KEYS
                }
            if _proves(tree, rank, members, found):
                state |= found
                break
        else:
            raise LayoutError(
                f"{where}: {totals[MASTER]} elements in which no known order of the {len(members)} parameters finds"
                f" their weights again, for example {members[-1].name}; {_FIX}"
            )
    return state


def _segments(value: Any, where: str) -> list[StoredTensor]:
    parts = value if isinstance(value, (list, tuple)) else [value]
    if not parts or not all(isinstance(part, StoredTensor) and len(part.shape) == 1 for part in parts):
        raise LayoutError(f"{where} is no flat tensor; {_FIX}")
    return list(parts)


def _offsets(tree: MegatronTree, members: Sequence[_Entry], totals: dict[str, int]) -> Iterator[list[int]]:
    """Yield the offsets that Megatron may have given to the parameters and that fill the flat tensors exactly."""
    data = argument(tree.arguments, "data_parallel_size", int) or 1
    data *= argument(tree.arguments, "context_parallel_size", int) or 1
    bucket_sizes = [None, argument(tree.arguments, "ddp_bucket_size", int)]  # None: a single bucket
    if count := argument(tree.arguments, "ddp_num_buckets", int):
        bucket_sizes.append(sum(entry.elements for entry in members) // count)
    bucket_sizes.append(max(_DEFAULT_BUCKET, 1_000_000 * data))
    seen = []
    for alignment, bucket_size, shared_apart in product(_ALIGNMENTS, bucket_sizes, (True, False)):
        offsets, total = _pack(members, alignment, bucket_size, shared_apart)
        if set(totals.values()) == {total} and offsets not in seen:
            seen.append(offsets)
            yield offsets


def _pack(
    members: Sequence[_Entry], alignment: int, bucket_size: int | None, shared_apart: bool
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


def _from_groups(tree: MegatronTree, rank: Rank, entries: list[_Entry], part: dict[str, Any]) -> State:
    """Return the state of `entries`, all parameters of one plain optimizer."""
    reader = tree.reader(tree.path(rank))
    inner = part["optimizer"] if isinstance(part.get("optimizer"), dict) else part
    groups, moments = inner.get("param_groups"), inner.get("state")
    masters = part.get("fp32_from_fp16_params", part.get("fp32_from_fp16"))
    if not isinstance(groups, list) or not isinstance(moments, dict):
        raise LayoutError(f"{reader.path}: the optimizer has no param_groups and state; {_FIX}")
    indices = [_indices(group) for group in groups]
    by_group = masters if isinstance(masters, list) and len(masters) == len(groups) else [[]] * len(groups)
    is_single = sum(bool(numbers) for numbers in indices) == 1
    # Megatron-Core applies no weight decay to vectors and biases, and so puts them into a separate group; under its
    # option apply_wd_to_qk_layernorm, not those of the norms of query and key.
    vectors = {entry.key for entry in entries if len(entry.weight.shape) == 1 or entry.name.endswith(".bias")}
    norms = {entry.key for entry in entries if "q_layernorm." in entry.name or "k_layernorm." in entry.name}
    for undecayed in (vectors, vectors - norms):
        found: State = {}
        for group, numbers, halves in zip(groups, indices, by_group, strict=True):
            no_decay = isinstance(group, dict) and group.get("wd_mult") == 0.0
            members = [entry for entry in entries if is_single or (entry.key in undecayed) is no_decay]
            if len(members) == len(numbers):
                own = [moments.get(number) for number in numbers]
                found |= _of_group(reader, members, own, halves if isinstance(halves, list) else [])
        if len(found) == len(entries) and _proves(tree, rank, entries, found):
            return found
    raise LayoutError(
        f"{reader.path}: the optimizer's groups of {[len(numbers) for numbers in indices]} parameters do not fit the"
        f" model's {len(entries)}, in its order and shapes; {_FIX}"
    )


def _indices(group: Any) -> list[int]:
    """Return the numbers of a group's parameters in the optimizer's state."""
    numbers = group.get("params") if isinstance(group, dict) else None
    return [number for number in numbers if isinstance(number, int)] if isinstance(numbers, list) else []


def _of_group(reader: TorchFileReader, members: list[_Entry], moments: list[Any], masters: list[Any]) -> State:
    """Return the state of a group's parameters, without those whose tensors are missing or of another shape."""
    found: State = {}
    halves = iter(masters)
    for entry, own in zip(members, moments, strict=True):
        is_half = entry.weight.dtype in ("bfloat16", "float16")
        stored = {MASTER: next(halves, None) if is_half else entry.weight}
        stored |= {kind: own.get(kind) if isinstance(own, dict) else None for kind in MOMENTS}
        tensors = {kind: tensor for kind, tensor in stored.items() if isinstance(tensor, StoredTensor)}
        if len(tensors) == len(stored) and all(tensor.shape == entry.weight.shape for tensor in tensors.values()):
            found[entry.key] = {
                kind: LazyTensor(entry.weight.shape, "float32", partial(_read_float, reader, tensor))
                for kind, tensor in tensors.items()
            }
    return found


def _read_float(reader: TorchFileReader, stored: StoredTensor) -> "Tensor":
    return reader.read(stored).float()
