"""Load a checkpoint into an engine, whatever layout wrote it.

A run that is resumed on the same layout continues bit for bit as if it had not been stopped; under other parallel sizes
it continues up to rounding: each rank then reads the pieces of its own parameters from the files of all ranks that
wrote them (`mbridge_ckpt.WholeModel`); nothing is gathered, and no other copy is written.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from mbridge_ckpt import (
    MANIFEST_FILE,
    Checkpoint,
    CorruptCheckpointError,
    LayoutError,
    ParameterPlacement,
    WholeModel,
    find_iteration,
    iteration_directory,
    model_file,
    open_checkpoint,
    optimizer_file,
    restore_random_state,
    verify,
)
from mbridge_ckpt.store.whole_model import MASTER, MODEL, MOMENTS
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from torch import Tensor

from mbridge_train.checkpoint import optimizer_state, torch_dist
from mbridge_train.checkpoint.placement import model_parallel_ranks, model_state, parameter_names, placements
from mbridge_train.checkpoint.save import LOOP_FILE
from mbridge_train.engine.engine import Engine
from mbridge_train.errors import TrainError


def load_checkpoint(engine: Engine, checkpoint: Checkpoint | Path) -> dict[str, Any]:
    """Restore engine and random streams from a checkpoint. Collective over all ranks.

    The tensor-, pipeline- and data-parallel sizes may differ from those of the run that saved. With the same sizes the
    random streams (of dropout) continue, too; with others they start from the seed.

    Returns:
        The `loop_state` that was saved; {} for a checkpoint imported from Megatron-LM, which has none.

    Raises:
        TrainError: the checkpoint was written for another model.
        mbridge_ckpt.CheckpointError: a file is missing or damaged.
    """
    if isinstance(checkpoint, Path):
        checkpoint = open_checkpoint(checkpoint)
    with engine.onloaded():
        load_model(engine, checkpoint)
        if engine.optimizer is not None:
            state = _read_optimizer(engine, checkpoint)
            optimizer_state.restore(engine.optimizer, parameter_names(engine), engine.layout, state)
    if checkpoint.layout == engine.layout.checkpoint:
        own = checkpoint.load_rank_state(torch.distributed.get_rank())
        if own is not None:
            restore_random_state(own["random"])
            get_cuda_rng_tracker().set_states(own["streams"])
    return checkpoint.load_json(LOOP_FILE) if checkpoint.has(LOOP_FILE) else {}


def load_start(engine: Engine, path: Path) -> None:
    """Load the weights that a run begins with. Collective over all ranks.

    Args:
        path: a checkpoint of ours, or a `torch_dist` directory of Megatron-Core, with or without a tracker file.

    Raises:
        TrainError: it is of another model, or a tree of Megatron-LM's other format, which has to be imported first.
        mbridge_ckpt.CheckpointError: there is no checkpoint, or a file is missing or damaged.
    """
    if (path / MANIFEST_FILE).exists() or (path / "latest").exists():
        return load_model(engine, open_checkpoint(path))
    directory = find_iteration(path)
    if torch_dist.is_torch_dist(directory):
        return _copy_in(engine, torch_dist.read_model(engine, directory))
    if any(directory.glob("mp_rank_*")):
        raise TrainError(
            f"{path} is a tree of Megatron-LM; import it with `mbridge-ckpt import-megatron {path} DIRECTORY` and set "
            "actor.model.megatron_checkpoint to the result"
        )
    return load_model(engine, open_checkpoint(path))


def load_model(engine: Engine, checkpoint: Checkpoint) -> None:
    """Load only the weights, under any layout. Every data-parallel rank reads for itself.

    Raises `TrainError` if the checkpoint was written for another model.
    """
    reads_own = [False] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(reads_own, _reads_only_own_file(engine, checkpoint))
    if not all(reads_own):
        report = verify(checkpoint.path, only_needed_to_resume=True)  # each rank reads a share
        if not report.resumable:
            raise CorruptCheckpointError("; ".join(fault.message for fault in report.faults))
    _copy_in(engine, _read_model(engine, checkpoint))


def _copy_in(engine: Engine, weights: dict[str, Tensor]) -> None:
    with engine.onloaded(), torch.no_grad():
        for name, tensor in model_state(engine).items():
            tensor.copy_(weights[name])
        if engine.optimizer is not None:
            # Half-precision training keeps fp32 copies of the weights, which the first step would write back.
            engine.optimizer.megatron.reload_model_params()


def _read_model(engine: Engine, checkpoint: Checkpoint) -> dict[str, Tensor]:
    if torch_dist.is_torch_dist(_iteration(checkpoint)):
        return torch_dist.read_model(engine, _iteration(checkpoint))
    if not _reads_only_own_file(engine, checkpoint):
        with WholeModel(checkpoint) as whole:
            return _assemble_model(engine, whole)
    path = model_file(checkpoint.step, checkpoint.layout, **model_parallel_ranks(engine))
    saved: dict[str, Tensor] = checkpoint.load_torch(path, mmap=True)["model"]
    own = model_state(engine)
    wrong = sorted(set(saved) ^ set(own)) or [name for name in own if own[name].shape != saved[name].shape]
    if wrong:
        raise TrainError(
            f"{checkpoint.path / path} does not fit this model: {len(wrong)} tensor(s) differ, first {wrong[0]!r}; "
            "it was written for another model, or another vocabulary or depth"
        )
    return saved


def _read_optimizer(engine: Engine, checkpoint: Checkpoint) -> dict[str, Any] | None:
    """Read the state of this model-parallel rank, on the rank that writes it; None on the others."""
    if torch_dist.is_torch_dist(_iteration(checkpoint)):
        return torch_dist.read_optimizer(engine, _iteration(checkpoint))
    if not engine.layout.is_writer:
        return None
    if not _reads_only_own_file(engine, checkpoint):
        with WholeModel(checkpoint) as whole:
            return _assemble_optimizer(engine, whole)
    path = optimizer_file(checkpoint.step, checkpoint.layout, **model_parallel_ranks(engine))
    state: dict[str, Any] = checkpoint.load_torch(path, mmap=True)
    return state


def _reads_only_own_file(engine: Engine, checkpoint: Checkpoint) -> bool:
    """Return whether this rank needs only the file of its model-parallel rank, whose checksum it compares."""
    # Data-parallel ranks have the same weights, and the optimizer's state is stored whole: their number may differ.
    layout = engine.layout.checkpoint
    if replace(checkpoint.layout, data=layout.data) != layout or torch_dist.is_torch_dist(_iteration(checkpoint)):
        return False
    # Stages may be cut elsewhere under the same sizes: the first one of a vision-language model may have more layers.
    path = model_file(checkpoint.step, checkpoint.layout, **model_parallel_ranks(engine))
    stored = {placement.name: placement.global_name for placement in checkpoint.manifest.file(path).placements}
    return stored == {placement.name: placement.global_name for placement in placements(engine)}


def _iteration(checkpoint: Checkpoint) -> Path:
    return checkpoint.path / iteration_directory(checkpoint.step)


def _assemble_model(engine: Engine, whole: WholeModel) -> dict[str, Tensor]:
    """Read the weights of this rank by its own names, CPU tensors in the shapes of its parameters."""
    placed = placements(engine)
    if difference := _difference(engine, whole, placed):
        raise TrainError(
            f"{whole.checkpoint.path} does not fit this model: it has {difference}; it was written for another model, "
            "or another vocabulary or depth"
        )
    unplaced = sorted(set(model_state(engine)) - {placement.name for placement in placed})
    if unplaced:
        layout = whole.checkpoint.layout
        raise TrainError(
            f"{whole.checkpoint.path}: {unplaced[0]!r} is a buffer of the model, for which a checkpoint does not say "
            f"how the layout cut it; resume with actor.model.tensor_model_parallel_size={layout.tensor} and "
            f"actor.model.pipeline_model_parallel_size={layout.pipeline}"
        )
    return _pieces(engine, whole, MODEL, placed)


def _assemble_optimizer(engine: Engine, whole: WholeModel) -> dict[str, Any]:
    """Read the state of this rank's optimizer in the form of `optimizer_state.collect`."""
    trained = set(parameter_names(engine).values())
    placed = [placement for placement in placements(engine) if placement.name in trained]
    first = optimizer_file(whole.checkpoint.step, whole.checkpoint.layout, tensor_rank=0)
    return whole.load(first) | {key: _pieces(engine, whole, key, placed) for key in (MASTER, *MOMENTS)}


def _pieces(engine: Engine, whole: WholeModel, kind: str, placed: list[ParameterPlacement]) -> dict[str, Tensor]:
    own, size, rank = model_state(engine), engine.layout.tensor.size, engine.layout.tensor.rank
    pieces = {}
    for placement in placed:
        padded = own[placement.name].shape[0] * size if placement.vocabulary_rows is not None else None
        name = _stored_name(whole, placement)
        pieces[placement.name] = whole.read(kind, name, rank=rank, size=size, rows=padded)
    return pieces


def _stored_name(whole: WholeModel, placement: ParameterPlacement) -> str:
    """Return the name in the checkpoint: a tied output layer on a later stage may be stored as the embedding."""
    if placement.global_name in whole.parameters:
        return placement.global_name
    originals = (n for n, p in whole.parameters.items() if p.placement.last_stage_copy == placement.global_name)
    return next(originals, placement.global_name)


def _difference(engine: Engine, whole: WholeModel, placed: list[ParameterPlacement]) -> str | None:
    """Return what the checkpoint has instead of the model's parameters, if it differs."""
    names = {placement.name: _stored_name(whole, placement) for placement in placed}
    if missing := sorted(set(names.values()) - set(whole.parameters)):
        return f"no {missing[0]!r}"
    if whole.layers != engine.config.num_layers:
        return f"{whole.layers} layers, the model {engine.config.num_layers}"
    own = model_state(engine)
    for placement in placed:
        name, shape = names[placement.name], tuple(own[placement.name].shape)
        rows = whole.parameters[name].placement.vocabulary_rows
        if rows != placement.vocabulary_rows:
            return f"a vocabulary of {rows} tokens, the model {placement.vocabulary_rows}"
        if rows is not None:
            continue
        try:
            stored, _ = whole.shape(MODEL, name, size=engine.layout.tensor.size)
        except LayoutError as error:
            raise TrainError(str(error)) from None
        if stored != shape:
            return f"{placement.global_name!r} in shape {stored}, the model {shape}"
    return None
