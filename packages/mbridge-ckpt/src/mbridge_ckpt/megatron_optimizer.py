"""Find each parameter's optimizer state in a file of Megatron-LM, which has no names in it.

The distributed optimizer (`distrib_optim.pt`, Megatron-Core's `DistributedOptimizer.save_parameter_state`) stores flat
float32 tensors: for each gradient buffer (one for each dtype of a model chunk's parameters) the master weights and the
two moments of all its parameters in reverse order. Each begins at a multiple of 64 elements within its bucket, and
buckets follow each other without their own padding; before February 2024 there was none, and a tensor for each bucket.
The plain optimizer stores moments by index, counted through the parameter groups, in which parameters stand in the
order of the model. Either mapping is deduced from that order, and master weights prove it: rounded to the model's dtype
they must equal the weights beside them. What cannot be mapped is refused.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from math import ceil, prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mbridge_ckpt.errors import LayoutError
from mbridge_ckpt.megatron_names import EMBEDDING, OUTPUT_LAYER
from mbridge_ckpt.megatron_pickle import argument
from mbridge_ckpt.megatron_tree import OPTIMIZER_FILE, MegatronTree, ModelStage, Rank
from mbridge_ckpt.torch_inspect import StoredTensor
from mbridge_ckpt.torch_reader import TorchFileReader
from mbridge_ckpt.torch_zip import LazyTensor

if TYPE_CHECKING:
    from torch import Tensor

MASTER, MOMENTS = "fp32_param", ("exp_avg", "exp_avg_sq")
_FLAT_KEYS = {MASTER: "param", "exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq"}
_ALIGNMENTS = (64, 1)
_DEFAULT_BUCKET = 40_000_000
_FIX = "import the weights alone with --no-optimizer"


@dataclass(frozen=True, slots=True)
class _Entry:
    """A parameter of the rank: where its weight lies, and whether it is an expert's."""

    stage: ModelStage
    name: str
    weight: StoredTensor
    is_expert: bool
    is_shared_embedding: bool

    @property
    def elements(self) -> int:
        return prod(self.weight.shape)


State = dict[tuple[str, str], dict[str, LazyTensor]]
"""For (stage's key, parameter's name in the file) of a rank: master weight and moments, float32, in its shape."""


@dataclass(frozen=True, slots=True)
class RankOptimizer:
    """A rank's optimizer state, Adam's step count, and the state of fp16's loss scale if there is one."""

    state: State
    step: int
    grad_scaler: dict[str, Any] | None


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
    # A second optimizer is that of experts with data-parallel groups of their own.
    shares = [entries] if len(parts) == 1 else [[e for e in entries if e.is_expert is flag] for flag in (False, True)]
    state: State = {}
    if (path.parent / OPTIMIZER_FILE).exists():
        flat_path = path.parent / OPTIMIZER_FILE
        reader = tree.reader(flat_path)
        flat_parts = reader.value if isinstance(reader.value, list) else [reader.value]
        if len(flat_parts) != len(parts):
            raise LayoutError(
                f"{flat_path}: state of {len(flat_parts)} optimizers, {path.name} has {len(parts)}; {_FIX}"
            )
        for share, flat in zip(shares, flat_parts, strict=True):
            if flat is not None:  # None: another data-parallel rank's, which is the first expert rank's file
                state |= _from_buffers(tree, rank, share, flat, reader)
    else:
        for share, part in zip(shares, parts, strict=True):
            state |= _from_groups(tree, rank, share, part)
    return RankOptimizer(state, _step(tree, path, parts), _grad_scaler(tree.reader(path), parts))


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


def _from_buffers(tree: MegatronTree, rank: Rank, entries: list[_Entry], flat: Any, reader: TorchFileReader) -> State:
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
        segments = {kind: _segments(world.get(key), f"{where}: {key}") for kind, key in _FLAT_KEYS.items()}
        totals = {kind: sum(segment.shape[0] for segment in parts) for kind, parts in segments.items()}
        for offsets in _placings(members, totals, _bucket_sizes(tree, members)):
            found = {
                (entry.stage.key, entry.name): {
                    kind: _flat_piece(reader, segments[kind], offset, entry) for kind in _FLAT_KEYS
                }
                for entry, offset in zip(members, offsets, strict=True)
            }
            if _first_unlike(tree, rank, members, found) is None:
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


def _bucket_sizes(tree: MegatronTree, members: Sequence[_Entry]) -> list[int | None]:
    """Sizes of a bucket that Megatron may have used; None is one bucket."""
    data = argument(tree.arguments, "data_parallel_size", int) or 1
    data *= argument(tree.arguments, "context_parallel_size", int) or 1
    sizes: list[int | None] = [None, argument(tree.arguments, "ddp_bucket_size", int)]
    if count := argument(tree.arguments, "ddp_num_buckets", int):
        sizes.append(sum(entry.elements for entry in members) // count)
    return [*sizes, max(_DEFAULT_BUCKET, 1_000_000 * data)]


def _placings(
    members: Sequence[_Entry], totals: dict[str, int], bucket_sizes: Sequence[int | None]
) -> Iterator[list[int]]:
    """Possible offsets of the parameters in the flat tensors, of those that fill them exactly."""
    seen = []
    for alignment in _ALIGNMENTS:
        for bucket_size in bucket_sizes:
            for shared_apart in (True, False):
                offsets, total = _placing(members, alignment, bucket_size, shared_apart)
                if set(totals.values()) == {total} and offsets not in seen:
                    seen.append(offsets)
                    yield offsets


def _placing(
    members: Sequence[_Entry], alignment: int, bucket_size: int | None, shared_apart: bool
) -> tuple[list[int], int]:
    """Offsets and total of Megatron-Core's layout without the padding at the ends of buckets."""
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


def _flat_piece(reader: TorchFileReader, segments: list[StoredTensor], offset: int, entry: _Entry) -> LazyTensor:
    return LazyTensor(entry.weight.shape, "float32", partial(_read_flat, reader, segments, offset, entry.weight.shape))


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
    reader = tree.reader(tree.path(rank))
    inner = part["optimizer"] if isinstance(part.get("optimizer"), dict) else part
    masters = part.get("fp32_from_fp16_params", part.get("fp32_from_fp16"))
    groups, moments = inner.get("param_groups"), inner.get("state")
    if not isinstance(groups, list) or not isinstance(moments, dict):
        raise LayoutError(f"{reader.path}: the optimizer has no param_groups and state; {_FIX}")
    for rule in (_is_vector, _is_vector_but_query_key_norm):
        members = _members(groups, entries, rule)
        if members is None:
            continue
        found: State = {}
        for number, (group, names) in enumerate(zip(groups, members, strict=True)):
            own_masters = masters[number] if isinstance(masters, list) and number < len(masters) else None
            halves = iter(own_masters if isinstance(own_masters, list) else [])
            for index, entry in zip(group["params"], names, strict=True):
                is_half = entry.weight.dtype in ("bfloat16", "float16")
                of_index = moments.get(index)
                own = of_index if isinstance(of_index, dict) else {}
                stored = {kind: own.get(kind) for kind in MOMENTS}
                stored[MASTER] = next(halves, None) if is_half else entry.weight
                if not all(isinstance(t, StoredTensor) and t.shape == entry.weight.shape for t in stored.values()):
                    break
                found[entry.stage.key, entry.name] = {
                    kind: LazyTensor(entry.weight.shape, "float32", partial(_read_float, reader, tensor))
                    for kind, tensor in stored.items()
                }
        if len(found) == len(entries) and _first_unlike(tree, rank, entries, found) is None:
            return found
    raise LayoutError(
        f"{reader.path}: the optimizer's groups of {[len(group.get('params', [])) for group in groups]} parameters do"
        f" not fit the model's {len(entries)}, in its order and shapes; {_FIX}"
    )


def _is_vector(entry: _Entry) -> bool:
    """Megatron-Core decays no vectors and biases, which so are a parameter group of their own."""
    return len(entry.weight.shape) == 1 or entry.name.endswith(".bias")


def _is_vector_but_query_key_norm(entry: _Entry) -> bool:
    """As above with its option apply_wd_to_qk_layernorm."""
    return _is_vector(entry) and "q_layernorm." not in entry.name and "k_layernorm." not in entry.name


def _members(groups: list[Any], entries: list[_Entry], rule: Any) -> list[list[_Entry]] | None:
    """The parameters of each group; None if there are not as many as the groups say."""
    members: list[list[_Entry]] = []
    whole = sum(bool(isinstance(group, dict) and group.get("params")) for group in groups) == 1
    for group in groups:
        indices = group.get("params") if isinstance(group, dict) else None
        if not isinstance(indices, list) or not all(isinstance(index, int) for index in indices):
            return None
        undecayed = group.get("wd_mult") == 0.0
        kept = [entry for entry in entries if whole or rule(entry) is undecayed] if group["params"] else []
        if len(kept) != len(group["params"]):
            return None
        members.append(kept)
    return members


def _read_float(reader: TorchFileReader, stored: StoredTensor) -> "Tensor":
    return reader.read(stored).float()


def _first_unlike(tree: MegatronTree, rank: Rank, entries: Sequence[_Entry], state: State) -> str | None:
    """The first parameter whose master weight, rounded to the model's dtype, is not its weight."""
    import torch

    for entry in entries:
        weight = tree.read(entry.stage, entry.name, rank[0], rank[2])
        master = state[entry.stage.key, entry.name][MASTER].read()
        if not torch.equal(master.to(weight.dtype), weight):
            return entry.name
    return None


def _step(tree: MegatronTree, path: Path, parts: list[dict[str, Any]]) -> int:
    """Adam's count: of the groups (Transformer Engine's and Apex's), or of the parameters (torch's)."""
    reader, found = tree.reader(path), set()
    for part in parts:
        inner = part["optimizer"] if isinstance(part.get("optimizer"), dict) else part
        moments = inner.get("state")
        holders = [group for group in inner.get("param_groups") or [] if isinstance(group, dict)]
        holders += list(moments.values()) if isinstance(moments, dict) else []
        for holder in holders:
            value = holder.get("step") if isinstance(holder, dict) and holder.get("params", True) else None
            value = reader.read(value).item() if isinstance(value, StoredTensor) and value.shape == () else value
            if isinstance(value, (int, float)) and float(value).is_integer():
                found.add(int(value))
    if len(found) != 1:
        raise LayoutError(f"{path}: Adam's step counts are {sorted(found)}, expected one; {_FIX}")
    return found.pop()


def _grad_scaler(reader: TorchFileReader, parts: list[dict[str, Any]]) -> dict[str, Any] | None:
    saved = parts[0].get("grad_scaler")
    if not isinstance(saved, dict):
        return None
    return {key: reader.read(item) if isinstance(item, StoredTensor) else item for key, item in saved.items()}
