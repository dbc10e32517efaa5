"""Load a checkpoint into an engine, whatever layout wrote it.

A run that is resumed on the same layout continues bit for bit as if it had not been stopped; under other parallel sizes
it continues up to rounding.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from mbridge_ckpt import (
    MANIFEST_FILE,
    Checkpoint,
    CorruptCheckpointError,
    WholeModel,
    find_iteration,
    iteration_directory,
    model_file,
    open_checkpoint,
    optimizer_file,
    restore_random_state,
    verify,
)
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from torch import Tensor

from mbridge_train.checkpoint import optimizer_state, relayout, torch_dist
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

    Raises:
        TrainError: the checkpoint was written for another model.
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
            return relayout.read_model(engine, whole)
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
            return relayout.read_optimizer(engine, whole)
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
