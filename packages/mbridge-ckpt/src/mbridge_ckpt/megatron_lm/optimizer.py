"""Find each parameter's optimizer state in the files of a Megatron-LM rank, which do not name it.

The mapping is inferred from the order of the model's parameters, and the master weights prove it: rounded to the dtype
of the model they must equal the weights. A state that cannot be mapped with certainty is refused.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mbridge_ckpt.errors import LayoutError
from mbridge_ckpt.formats.torch_pickle import StoredTensor
from mbridge_ckpt.formats.torch_reader import TorchFileReader
from mbridge_ckpt.megatron_lm.names import EMBEDDING, OUTPUT_LAYER
from mbridge_ckpt.megatron_lm.optimizer_buffers import from_buffers
from mbridge_ckpt.megatron_lm.optimizer_entries import FIX, Entry, State
from mbridge_ckpt.megatron_lm.optimizer_groups import from_groups
from mbridge_ckpt.megatron_lm.tree import OPTIMIZER_FILE, MegatronTree, Rank


@dataclass(frozen=True, slots=True)
class RankOptimizer:
    """A rank's optimizer state, Adam's step count, and the state of the fp16 loss scaler if there is one."""

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
        raise LayoutError(f"{path}: holds no optimizer state; {FIX}")
    parts = saved if isinstance(saved, list) else [saved]
    if not all(isinstance(part, dict) for part in parts) or len(parts) > 2:
        raise LayoutError(f"{path}: the optimizer has {len(parts)} parts of unknown form; {FIX}")
    entries = list(_entries(tree, rank, tied))
    # A second optimizer is that of experts, which have separate data-parallel groups.
    shares = [entries] if len(parts) == 1 else [[e for e in entries if e.is_expert is flag] for flag in (False, True)]
    state: State = {}
    if (path.parent / OPTIMIZER_FILE).exists():
        reader = tree.reader(path.parent / OPTIMIZER_FILE)
        flat_parts = reader.value if isinstance(reader.value, list) else [reader.value]
        if len(flat_parts) != len(parts):
            raise LayoutError(
                f"{reader.path}: state of {len(flat_parts)} optimizers, {path.name} has {len(parts)}; {FIX}"
            )
        for share, flat in zip(shares, flat_parts, strict=True):
            if flat is not None:  # None: it is in the file of the first expert rank
                state |= from_buffers(tree, rank, share, flat, reader)
    else:
        for share, part in zip(shares, parts, strict=True):
            state |= from_groups(tree, rank, share, part)
    missing = [e.name for e in entries if (e.stage.key, e.name) not in state and (e.is_expert or rank[2] == 0)]
    if missing:
        raise LayoutError(f"{path.parent}: no optimizer state of {missing[0]}; {FIX}")
    return RankOptimizer(state, _step(tree, path, parts), _grad_scaler(tree.reader(path), parts))


def _entries(tree: MegatronTree, rank: Rank, tied: bool) -> Iterator[Entry]:
    ends = {(tree.stages[0].key, EMBEDDING), (tree.stages[-1].key, OUTPUT_LAYER)}
    for stage in tree.stages:
        if stage.pipeline_rank != rank[1]:
            continue
        weights = tree.weights(stage, rank[0], rank[2])
        for parameter in stage.parameters:
            if parameter.cut != "buffer":
                shared = tied and len(tree.stages) > 1 and (stage.key, parameter.name) in ends
                yield Entry(stage, parameter.name, weights[parameter.name], parameter.expert is not None, shared)


def _step(tree: MegatronTree, path: Path, parts: list[dict[str, Any]]) -> int:
    """Return Adam's step count, kept by group (Transformer Engine, Apex) or by parameter (torch)."""
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
        raise LayoutError(f"{path}: Adam's step counts are {sorted(found)}, expected one; {FIX}")
    return found.pop()


def _grad_scaler(reader: TorchFileReader, parts: list[dict[str, Any]]) -> dict[str, Any] | None:
    saved = parts[0].get("grad_scaler")
    if not isinstance(saved, dict):
        return None
    return {key: reader.read(item) if isinstance(item, StoredTensor) else item for key, item in saved.items()}
