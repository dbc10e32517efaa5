"""Saving and resuming a training run: model, optimizer, schedule, random streams and the loop's own state.

The files and their guarantees are `mbridge_ckpt`'s; this module says what goes into them. A run that is resumed on the
same layout continues bit for bit like one that was never stopped; under other parallel sizes, to rounding.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from mbridge_ckpt import (
    MANIFEST_FILE,
    RECIPE_FILE,
    AsyncSaver,
    Checkpoint,
    CorruptCheckpointError,
    HfRecipe,
    HfTensor,
    Save,
    WholeModel,
    begin_save,
    capture_random_state,
    find_iteration,
    iteration_directory,
    model_file,
    open_checkpoint,
    optimizer_file,
    restore_random_state,
    verify,
    write_hf,
)
from mbridge_model import export_recipe
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from torch import Tensor

from mbridge_train.checkpoint import optimizer_state, relayout, torch_dist
from mbridge_train.checkpoint.placement import (
    current_layout,
    is_first_data_rank,
    model_parallel_ranks,
    model_state,
    parameter_names,
    placements,
)
from mbridge_train.engine.engine import Engine
from mbridge_train.errors import TrainError

LOOP_FILE = "state/loop.json"


def save_checkpoint(
    engine: Engine,
    directory: Path,
    *,
    step: int,
    loop_state: dict[str, Any],
    metrics: dict[str, float] | None = None,
    export_hf: bool = True,
    max_shard_size: str = "5GB",
    file_format: Literal["torch", "torch_dist"] = "torch",
    saver: AsyncSaver | None = None,
) -> Path:
    """Save everything that the run needs to go on. Collective over all ranks.

    What is offloaded is brought to the device for it and offloaded again.

    Args:
        engine: with an optimizer.
        directory: `<output_dir>/<experiment_name>/checkpoints`.
        step: number of the checkpoint, `global_step_<step>`.
        loop_state: JSON object of the application's loop, the same on every rank.
        metrics: stored beside, for retention by a metric.
        export_hf: also write the weights as a HuggingFace directory.
        max_shard_size: of that directory's files.
        file_format: "torch": files of each model-parallel rank, by parameter name; "torch_dist": Megatron-Core's
            distributed checkpoint. Both are read under any layout.
        saver: writes in the background; the weights may change as soon as this returns. Not with "torch_dist".

    Returns:
        The committed directory; with `saver` the one that will be.

    Raises:
        mbridge_ckpt.SaveError: on every rank, if one rank could not write; nothing is then left half written.
    """
    with engine.onloaded():
        engine.synchronize_weights()
        layout = current_layout(engine)
        ranks = model_parallel_ranks(engine)
        state = None
        if engine.optimizer is not None:
            state = optimizer_state.collect(engine.optimizer, parameter_names(engine), engine.layout)
        recipe = _recipe(engine) if file_format == "torch" else None
        begin = begin_save if saver is None else saver.begin_save
        with begin(directory, step=step, layout=layout) as save:
            if isinstance(save, Save) and file_format == "torch_dist":
                torch_dist.write(engine, save, iteration_directory(step), state)
            elif is_first_data_rank(engine):
                content = {"model": model_state(engine), "iteration": step, "layout": layout.to_json()}
                save.write_torch(model_file(step, layout, **ranks), content, placements=placements(engine))
                if state is not None:
                    save.write_torch(optimizer_file(step, layout, **ranks), state)
            save.write_rank_state({"random": capture_random_state(), "streams": get_cuda_rng_tracker().get_states()})
            if torch.distributed.get_rank() == 0:
                save.write_json(LOOP_FILE, loop_state)
            if recipe is not None and save.is_first:
                save.write_bytes(RECIPE_FILE, recipe.to_bytes())
            if export_hf:
                write_hf(save, engine.export_weights(), engine.handle.directory.path, max_shard_size=max_shard_size)
            return save.commit({"metrics": metrics or {}})


def _recipe(engine: Engine) -> HfRecipe | None:
    """For `mbridge-ckpt export-hf`, which makes the HuggingFace copy later and without Megatron."""
    entries = export_recipe(engine.model, engine.handle)
    if entries is None:
        return None
    return HfRecipe(tensors=tuple(HfTensor(**entry) for entry in entries), source=str(engine.handle.directory.path))


def load_checkpoint(engine: Engine, checkpoint: Checkpoint | Path) -> dict[str, Any]:
    """Put a saved state back into the engine and the random streams. Collective over all ranks.

    The sizes of the run may be others than those of the run that saved: tensor-, pipeline- and data-parallel alike.
    With the same sizes the random streams (dropout's) go on too; with others they stay as they were seeded.

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
    if checkpoint.layout == current_layout(engine):
        own = checkpoint.load_rank_state(torch.distributed.get_rank())
        if own is not None:
            restore_random_state(own["random"])
            get_cuda_rng_tracker().set_states(own["streams"])
    return checkpoint.load_json(LOOP_FILE) if checkpoint.has(LOOP_FILE) else {}


def load_start(engine: Engine, path: Path) -> None:
    """Load the weights that a run begins with. Collective over all ranks.

    Args:
        path: one of our checkpoints, or a `torch_dist` directory of Megatron-Core, also one with a tracker file.

    Raises:
        TrainError: another model's, or a tree of Megatron-LM's other format, which has to be imported first.
        mbridge_ckpt.CheckpointError: there is none, or a file is missing or damaged.
    """
    if (path / MANIFEST_FILE).exists() or (path / "latest").exists():
        return load_model(engine, open_checkpoint(path))
    directory = find_iteration(path)
    if torch_dist.is_torch_dist(directory):
        return _copy_in(engine, torch_dist.read_model(engine, directory))
    if any(directory.glob("mp_rank_*")):
        raise TrainError(
            f"{path} is a tree of Megatron-LM; import it with `mbridge-ckpt import-megatron {path} DIRECTORY` and set "
            "actor.model.megatron_checkpoint to what that makes"
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
            # Half-precision training has fp32 copies of the weights, which the first step would put back.
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
    """The state of this model-parallel rank, on data-parallel rank 0."""
    if torch_dist.is_torch_dist(_iteration(checkpoint)):
        return torch_dist.read_optimizer(engine, _iteration(checkpoint))
    if not is_first_data_rank(engine):
        return None
    if not _reads_only_own_file(engine, checkpoint):
        with WholeModel(checkpoint) as whole:
            return relayout.read_optimizer(engine, whole)
    path = optimizer_file(checkpoint.step, checkpoint.layout, **model_parallel_ranks(engine))
    state: dict[str, Any] = checkpoint.load_torch(path, mmap=True)
    return state


def _reads_only_own_file(engine: Engine, checkpoint: Checkpoint) -> bool:
    """Whether this rank finds what it needs in the one file of its model-parallel rank, whose checksum it compares."""
    # Data-parallel ranks have the same weights, and the optimizer's state is stored whole, so their number is free.
    layout = current_layout(engine)
    if replace(checkpoint.layout, data=layout.data) != layout or torch_dist.is_torch_dist(_iteration(checkpoint)):
        return False
    # With the same sizes, layers may still be cut elsewhere: the first stage of a vision-language model may have more.
    path = model_file(checkpoint.step, checkpoint.layout, **model_parallel_ranks(engine))
    stored = {placement.name: placement.global_name for placement in checkpoint.manifest.file(path).placements}
    return stored == {placement.name: placement.global_name for placement in placements(engine)}


def _iteration(checkpoint: Checkpoint) -> Path:
    return checkpoint.path / iteration_directory(checkpoint.step)
