"""Save a training run: model, optimizer, schedule, random streams and the loop's own state.

`mbridge_ckpt` writes the files and guarantees them; this module decides what they hold.
"""

from pathlib import Path
from typing import Any, Literal

import torch
from mbridge_ckpt import (
    RECIPE_FILE,
    AsyncSaver,
    HfRecipe,
    HfTensor,
    Save,
    begin_save,
    capture_random_state,
    iteration_directory,
    model_file,
    optimizer_file,
    write_hf,
)
from mbridge_model import export_recipe
from megatron.core.tensor_parallel import get_cuda_rng_tracker

from mbridge_train.checkpoint import optimizer_state, torch_dist
from mbridge_train.checkpoint.placement import model_parallel_ranks, model_state, parameter_names, placements
from mbridge_train.engine.engine import Engine

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
    """Save everything that the run needs to continue. Collective over all ranks.

    Offloaded tensors are brought to the device for the save and offloaded again.

    Args:
        engine: with an optimizer.
        directory: `<output_dir>/<experiment_name>/checkpoints`.
        step: number of the checkpoint, `global_step_<step>`.
        loop_state: JSON object of the application's loop, the same on every rank.
        metrics: stored in the manifest, for retention by a metric.
        export_hf: also write the weights as a HuggingFace directory.
        max_shard_size: largest file of that directory.
        file_format: "torch": files of each model-parallel rank, by parameter name; "torch_dist": Megatron-Core's
            distributed checkpoint. Both are read under any layout.
        saver: writes in the background; the weights may change as soon as this returns. Not with "torch_dist".

    Returns:
        The committed directory; with `saver`, the directory that will be committed.

    Raises:
        mbridge_ckpt.SaveError: on every rank, if one rank could not write; no partial checkpoint is left.
    """
    with engine.onloaded():
        engine.synchronize_weights()
        layout = engine.layout.checkpoint
        ranks = model_parallel_ranks(engine)
        state = None
        if engine.optimizer is not None:
            state = optimizer_state.collect(engine.optimizer, parameter_names(engine), engine.layout)
        entries = export_recipe(engine.model, engine.handle) if file_format == "torch" else None
        begin = begin_save if saver is None else saver.begin_save
        with begin(directory, step=step, layout=layout) as save:
            if isinstance(save, Save) and file_format == "torch_dist":
                torch_dist.write(engine, save, iteration_directory(step), state)
            elif engine.layout.is_writer:
                content = {"model": model_state(engine), "iteration": step, "layout": layout.to_json()}
                save.write_torch(model_file(step, layout, **ranks), content, placements=placements(engine))
                if state is not None:
                    save.write_torch(optimizer_file(step, layout, **ranks), state)
            save.write_rank_state({"random": capture_random_state(), "streams": get_cuda_rng_tracker().get_states()})
            if torch.distributed.get_rank() == 0:
                save.write_json(LOOP_FILE, loop_state)
            if entries is not None and save.is_first:
                # `mbridge-ckpt export-hf` makes the HuggingFace copy by it later and without Megatron.
                tensors = tuple(HfTensor(**entry) for entry in entries)
                recipe = HfRecipe(tensors=tensors, source=str(engine.handle.directory.path))
                save.write_bytes(RECIPE_FILE, recipe.to_bytes())
            if export_hf:
                write_hf(save, engine.export_weights(), engine.handle.directory.path, max_shard_size=max_shard_size)
            return save.commit({"metrics": metrics or {}})
