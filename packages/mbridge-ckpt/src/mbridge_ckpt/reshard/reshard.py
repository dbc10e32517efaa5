"""Reshard a checkpoint for another tensor- and pipeline-parallel layout, tensor by tensor and without Megatron."""

import os
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from math import ceil
from pathlib import Path
from typing import Any

from mbridge_ckpt.errors import CheckpointError, LayoutError
from mbridge_ckpt.formats.torch_pickle import StoredTensor, map_tensors
from mbridge_ckpt.formats.torch_reader import TorchFileReader
from mbridge_ckpt.formats.torch_zip import LazyTensor
from mbridge_ckpt.huggingface.recipe import RECIPE_FILE, read_recipe
from mbridge_ckpt.manifest.layout import (
    TRACKER_FILE,
    Layout,
    model_file,
    optimizer_file,
    refuse_inside_checkpoint,
    step_directory,
)
from mbridge_ckpt.manifest.placement import ParameterPlacement, local_name
from mbridge_ckpt.store.checkpoint import Checkpoint, open_checkpoint
from mbridge_ckpt.store.transaction import Save, begin_save
from mbridge_ckpt.store.verify import require_whole
from mbridge_ckpt.store.whole_model import MODEL, WholeModel

# Megatron pads a vocabulary to a multiple of one of these times the tensor-parallel size; tried in this order.
_VOCABULARY_MULTIPLES = (128, 1, 2, 4, 8, 16, 32, 64, 256, 512, 1024)

Target = tuple[ParameterPlacement, str]
"""A parameter in a file to be written: its placement there, and the name of the parameter that it is made from."""


def reshard(
    source: str | Path,
    directory: str | Path,
    *,
    tensor: int,
    pipeline: int,
    vocabulary_multiple: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> Path:
    """Write `source` (a checkpoint) into the checkpoints directory `directory`, cut for `tensor` and `pipeline`.

    Weights and optimizer state are cut; everything else (rank states, loop, HuggingFace export) is copied. Data- and
    context-parallel sizes stay, since files do not depend on them. A vocabulary's rows are padded to a multiple of
    `vocabulary_multiple` times `tensor`; by default to the multiple that explains the padding of `source`.

    Memory: two tensors of the source's largest. `source` is verified first, byte by byte. `progress` gets the bytes of
    each file verified and of each tensor written. Returns the new checkpoint. Raises CheckpointError's classes;
    LayoutError when a size does not divide what it must.
    """
    if vocabulary_multiple is not None and vocabulary_multiple < 1:
        raise LayoutError(f"the vocabulary multiple is {vocabulary_multiple}; it must be at least 1, or left out")
    checkpoint = open_checkpoint(source)
    final = Path(directory) / step_directory(checkpoint.step)
    refuse_inside_checkpoint(Path(directory))  # before the long reading
    if os.path.lexists(final):
        raise CheckpointError(f"{final} exists; nothing is overwritten, give another directory")
    require_whole(checkpoint.path, progress=progress)
    layout = replace(checkpoint.layout, tensor=tensor, pipeline=pipeline, virtual_pipeline=1, expert_tensor=1)
    with WholeModel(checkpoint) as whole:
        _refuse_shared_heads(whole, tensor)
        stages = [_stage_parameters(whole, layout, stage) for stage in range(pipeline)]
        rows = _padded_rows(whole, tensor, vocabulary_multiple)
        with begin_save(directory, step=checkpoint.step, layout=layout, existing="refuse") as save:
            for stage, targets in enumerate(stages):
                for rank in range(tensor):
                    _write_rank(save, whole, targets, rank, stage, rows, progress)
            _copy_rest(save, checkpoint, progress)
            metadata = checkpoint.metadata | {"resharded_from": checkpoint.layout.to_json()}
            return save.commit(metadata, writer=checkpoint.manifest.writer)


def _refuse_shared_heads(whole: WholeModel, size: int) -> None:
    """Raise LayoutError where Megatron could not load the attention: each rank needs whole query heads, and whole
    groups or an equal share of one. The rows alone could be cut nevertheless.
    """
    if not whole.checkpoint.has(RECIPE_FILE):
        return
    for tensor in read_recipe(whole.checkpoint).tensors:
        heads, groups, parameter = tensor.heads, tensor.groups, whole.parameters.get(tensor.parameter)
        if heads is None or groups is None or parameter is None or parameter.placement.partition_dim < 0:
            continue  # no attention, or one that is not cut
        if not _can_share(heads, groups, size):
            fitting = ", ".join(str(number) for number in range(1, heads + 1) if _can_share(heads, groups, number))
            raise LayoutError(
                f"{tensor.parameter}: {heads} heads in {groups} groups cannot be shared by {size} tensor-parallel"
                f" ranks: use one of {fitting}"
            )


def _can_share(heads: int, groups: int, size: int) -> bool:
    return heads % size == 0 and (groups % size == 0 or size % groups == 0)


def _stage_parameters(whole: WholeModel, layout: Layout, stage: int) -> list[Target]:
    """Return the parameters of a pipeline stage: those before the layers, the layers, those after them."""
    layers, last = whole.layers, layout.pipeline - 1
    if layers % layout.pipeline:
        raise LayoutError(f"{layers} layers cannot be divided over {layout.pipeline} pipeline stages; choose a divisor")
    each = layers // layout.pipeline
    copies = whole.copied_names()
    before, inside, after, copied = [], [], [], []
    for name, parameter in whole.parameters.items():
        placement = parameter.placement
        if name in copies:
            continue  # made below from its original
        if placement.stage == "layer":
            assert placement.layer is not None
            if placement.layer // each == stage:
                inside.append((replace(placement, name=local_name(placement, stage * each)), name))
        elif placement.stage == "every" or (placement.stage == "first" and stage == 0):
            before.append((replace(placement, name=name), name))
        elif placement.stage == "last" and stage == last:
            after.append((replace(placement, name=name), name))
        if placement.last_stage_copy and stage == last and stage != 0:
            copy = placement.last_stage_copy
            own = replace(placement, name=copy, global_name=copy, stage="last", last_stage_copy=None)
            copied.append((own, name))
    inside.sort(key=lambda target: target[0].layer or 0)  # stable: the order inside a layer stays
    return before + inside + after + copied


def _padded_rows(whole: WholeModel, size: int, multiple: int | None) -> dict[str, int]:
    """Return the padded number of rows of each vocabulary parameter at tensor-parallel size `size`."""
    rows = {}
    for name, parameter in whole.parameters.items():
        real, dimension = parameter.placement.vocabulary_rows, parameter.placement.partition_dim
        if real is None or dimension < 0:
            continue
        stored, old_size = whole.shape(MODEL, name)[0][dimension], len(parameter.files)
        fitting = [m for m in _VOCABULARY_MULTIPLES if ceil(real / (m * old_size)) * m * old_size == stored]
        if multiple is None and not fitting:
            raise LayoutError(f"{name}: no usual multiple pads {real} rows to {stored}; give the vocabulary multiple")
        unit = (multiple or fitting[0]) * size
        rows[name] = ceil(real / unit) * unit
    return rows


def _write_rank(
    save: Save,
    whole: WholeModel,
    targets: list[Target],
    rank: int,
    stage: int,
    rows: dict[str, int],
    progress: Callable[[int], None] | None,
) -> None:
    step, layout, old = whole.checkpoint.step, save.layout, whole.checkpoint.layout

    def lazy(kind: str, source: str) -> LazyTensor:
        padded = rows.get(source)
        shape, dtype = whole.shape(kind, source, size=layout.tensor, rows=padded)
        read = partial(whole.read, kind, source, rank=rank, size=layout.tensor, rows=padded)
        return LazyTensor(shape, dtype, read).counted(progress)

    for is_model, path_of in ((True, model_file), (False, optimizer_file)):
        first = path_of(step, old, tensor_rank=0)
        if not whole.checkpoint.has(first):
            continue
        reader = whole.reader(first)
        value: dict[str, Any] = {}
        for key, item in reader.value.items():
            if isinstance(item, dict) and (key == MODEL if is_model else _is_state(whole, key)):
                kept = ((placement.name, source) for placement, source in targets if whole.has(key, source))
                value[key] = {name: lazy(key, source) for name, source in kept}
            else:
                value[key] = layout.to_json() if key == "layout" else map_tensors(item, partial(_unread, reader))
        placements = [placement for placement, _ in targets] if is_model else []
        save.write_torch(path_of(step, layout, tensor_rank=rank, pipeline_rank=stage), value, placements=placements)


def _unread(reader: TorchFileReader, tensor: StoredTensor) -> LazyTensor:
    return LazyTensor(tensor.shape, tensor.dtype, partial(reader.read, tensor))


def _is_state(whole: WholeModel, kind: str) -> bool:
    return any(whole.has(kind, name) for name in whole.parameters)


def _copy_rest(save: Save, checkpoint: Checkpoint, progress: Callable[[int], None] | None) -> None:
    for record in checkpoint.manifest.files:
        path = checkpoint.path / record.path
        if record.path.startswith("actor/iter_") or record.path == TRACKER_FILE or not path.exists():
            continue
        save.copy(path, record.path, record.tensors)
        if progress is not None:
            progress(record.bytes)
