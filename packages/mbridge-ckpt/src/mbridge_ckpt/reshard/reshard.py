"""Reshard a checkpoint for another tensor- and pipeline-parallel layout, tensor by tensor and without Megatron."""

import os
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from mbridge_ckpt.errors import CheckpointError, LayoutError
from mbridge_ckpt.formats.torch_pickle import StoredTensor, map_tensors
from mbridge_ckpt.formats.torch_reader import TorchFileReader
from mbridge_ckpt.formats.torch_zip import LazyTensor
from mbridge_ckpt.manifest.layout import (
    TRACKER_FILE,
    model_file,
    optimizer_file,
    refuse_inside_checkpoint,
    step_directory,
)
from mbridge_ckpt.reshard.plan import Target, padded_rows, refuse_shared_heads, stage_parameters
from mbridge_ckpt.store.checkpoint import Checkpoint, open_checkpoint
from mbridge_ckpt.store.transaction import Save, begin_save
from mbridge_ckpt.store.verify import require_whole
from mbridge_ckpt.store.whole_model import MODEL, WholeModel


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
        refuse_shared_heads(whole, tensor)
        stages = [stage_parameters(whole, layout, stage) for stage in range(pipeline)]
        rows = padded_rows(whole, tensor, vocabulary_multiple)
        with begin_save(directory, step=checkpoint.step, layout=layout, existing="refuse") as save:
            for stage, targets in enumerate(stages):
                for rank in range(tensor):
                    _write_rank(save, whole, targets, rank, stage, rows, progress)
            _copy_rest(save, checkpoint, progress)
            metadata = checkpoint.metadata | {"resharded_from": checkpoint.layout.to_json()}
            return save.commit(metadata, writer=checkpoint.manifest.writer)


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
    for is_model, path_of in ((True, model_file), (False, optimizer_file)):
        first = path_of(step, old, tensor_rank=0)
        if not whole.checkpoint.has(first):
            continue
        reader = whole.reader(first)
        value: dict[str, Any] = {}
        for key, item in reader.value.items():
            if isinstance(item, dict) and (key == MODEL if is_model else _is_state(whole, key)):
                kept = [target for target in targets if whole.has(key, target.source)]
                value[key] = {t.placement.name: _lazy(whole, key, t, rank, layout.tensor, rows, progress) for t in kept}
            else:
                value[key] = layout.to_json() if key == "layout" else map_tensors(item, partial(_unread, reader))
        placements = [target.placement for target in targets] if is_model else []
        save.write_torch(path_of(step, layout, tensor_rank=rank, pipeline_rank=stage), value, placements=placements)


def _unread(reader: TorchFileReader, tensor: StoredTensor) -> LazyTensor:
    return LazyTensor(tensor.shape, tensor.dtype, partial(reader.read, tensor))


def _is_state(whole: WholeModel, kind: str) -> bool:
    return any(whole.has(kind, name) for name in whole.parameters)


def _lazy(
    whole: WholeModel,
    kind: str,
    target: Target,
    rank: int,
    size: int,
    rows: dict[str, int],
    progress: Callable[[int], None] | None,
) -> LazyTensor:
    padded = rows.get(target.source)
    shape, dtype = whole.shape(kind, target.source, size=size, rows=padded)
    read = partial(whole.read, kind, target.source, rank=rank, size=size, rows=padded)
    return LazyTensor(shape, dtype, read).counted(progress)


def _copy_rest(save: Save, checkpoint: Checkpoint, progress: Callable[[int], None] | None) -> None:
    for record in checkpoint.manifest.files:
        path = checkpoint.path / record.path
        if record.path.startswith("actor/iter_") or record.path == TRACKER_FILE or not path.exists():
            continue
        save.copy(path, record.path, record.tensors)
        if progress is not None:
            progress(record.bytes)
