"""Saving and resuming a training run: model, optimizer, schedule, random streams and the loop's own state.

The files and their guarantees are `mbridge_ckpt`'s; this module says what goes into them. A run that is resumed on the
same layout continues bit for bit like one that was never stopped.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from mbridge_ckpt import (
    Checkpoint,
    Layout,
    ParameterPlacement,
    begin_save,
    capture_random_state,
    model_file,
    open_checkpoint,
    optimizer_file,
    place_parameter,
    restore_random_state,
    write_hf,
)
from megatron.core import parallel_state
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from torch import Tensor, nn

from mbridge_train import optimizer_state
from mbridge_train.engine import Engine
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
) -> Path:
    """Save everything that the run needs to go on. Collective over all ranks.

    Args:
        engine: with an optimizer.
        directory: `<output_dir>/<experiment_name>/checkpoints`.
        step: number of the checkpoint, `global_step_<step>`.
        loop_state: JSON object of the application's loop, the same on every rank.
        metrics: stored beside, for retention by a metric.
        export_hf: also write the weights as a HuggingFace directory.

    Returns:
        The committed directory.

    Raises:
        mbridge_ckpt.SaveError: on every rank, if one rank could not write; nothing is then left half written.
    """
    engine.synchronize_weights()
    layout = current_layout()
    ranks = {"tensor_rank": _tensor_rank(), "pipeline_rank": _pipeline_rank()}
    state = optimizer_state.collect(engine.optimizer, _parameter_names(engine)) if engine.optimizer else None
    with begin_save(directory, step=step, layout=layout) as save:
        if parallel_state.get_data_parallel_rank() == 0:
            content = {"model": _model_state(engine), "iteration": step, "layout": layout.to_json()}
            save.write_torch(model_file(step, layout, **ranks), content, placements=_placements(engine))
            if state is not None:
                save.write_torch(optimizer_file(step, layout, **ranks), state)
        save.write_rank_state({"random": capture_random_state(), "streams": get_cuda_rng_tracker().get_states()})
        if torch.distributed.get_rank() == 0:
            save.write_json(LOOP_FILE, loop_state)
        if export_hf:
            write_hf(save, engine.export_weights(), engine.handle.directory.path)
        return save.commit({"metrics": metrics or {}})


def load_checkpoint(engine: Engine, checkpoint: Checkpoint | Path) -> dict[str, Any]:
    """Put a saved state back into the engine and the random streams. Collective over all ranks.

    Returns:
        The `loop_state` that was saved; {} for a checkpoint imported from Megatron-LM, which has none.

    Raises:
        TrainError: the checkpoint was written under another layout, or for another model.
        mbridge_ckpt.CheckpointError: a file is missing or damaged.
    """
    if isinstance(checkpoint, Path):
        checkpoint = open_checkpoint(checkpoint)
    layout = current_layout()
    if checkpoint.layout != layout:
        raise TrainError(_other_layout(checkpoint, layout))
    load_model(engine, checkpoint)
    if engine.optimizer is not None:
        path = optimizer_file(checkpoint.step, layout, tensor_rank=_tensor_rank(), pipeline_rank=_pipeline_rank())
        is_first = parallel_state.get_data_parallel_rank() == 0
        state = checkpoint.load_torch(path) if is_first else None
        optimizer_state.restore(engine.optimizer, _parameter_names(engine), state)
    own = checkpoint.load_rank_state(torch.distributed.get_rank())
    if own is not None:
        restore_random_state(own["random"])
        get_cuda_rng_tracker().set_states(own["streams"])
    return checkpoint.load_json(LOOP_FILE) if checkpoint.has(LOOP_FILE) else {}


def load_model(engine: Engine, checkpoint: Checkpoint) -> None:
    """Load only the weights. Every data-parallel rank reads the file of its model-parallel rank.

    Raises:
        TrainError: the checkpoint was written with other tensor or pipeline sizes, or for another model.
    """
    written, own_layout = checkpoint.layout, current_layout()
    # Data-parallel ranks have the same weights, so their number does not matter.
    if replace(written, data=own_layout.data) != own_layout:
        raise TrainError(_other_layout(checkpoint, own_layout))
    path = model_file(checkpoint.step, checkpoint.layout, tensor_rank=_tensor_rank(), pipeline_rank=_pipeline_rank())
    saved: dict[str, Tensor] = checkpoint.load_torch(path)["model"]
    own = _model_state(engine)
    wrong = sorted(set(saved) ^ set(own)) or [name for name in own if own[name].shape != saved[name].shape]
    if wrong:
        raise TrainError(
            f"{checkpoint.path / path} does not fit this model: {len(wrong)} parameter(s) differ, first {wrong[0]!r}; "
            "it was written for another model, or another vocabulary or depth"
        )
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(saved[name])
    if engine.optimizer is not None:
        # Half-precision training has fp32 copies of the weights, which the first step would put back.
        engine.optimizer.megatron.reload_model_params()


def current_layout() -> Layout:
    """Sizes of the process groups of this run."""
    return Layout(
        tensor=parallel_state.get_tensor_model_parallel_world_size(),
        pipeline=parallel_state.get_pipeline_model_parallel_world_size(),
        data=parallel_state.get_data_parallel_world_size(),
    )


def _other_layout(checkpoint: Checkpoint, layout: Layout) -> str:
    written = checkpoint.layout
    return (
        f"{checkpoint.path} was written with {_sizes(written)}, and this run has {_sizes(layout)}; "
        f"start {written.tensor * written.pipeline * written.data} ranks with "
        f"actor.model.tensor_model_parallel_size={written.tensor} and "
        f"actor.model.pipeline_model_parallel_size={written.pipeline}"
    )


def _sizes(layout: Layout) -> str:
    return f"TP {layout.tensor}, PP {layout.pipeline}, DP {layout.data}"


def _tensor_rank() -> int:
    return parallel_state.get_tensor_model_parallel_rank()


def _pipeline_rank() -> int:
    return parallel_state.get_pipeline_model_parallel_rank()


def _unwrapped(engine: Engine) -> nn.Module:
    """The bare Megatron model of this rank, inside data-parallel and half-precision wrappers."""
    module = engine.model[0]
    while hasattr(module, "module"):
        module = module.module
    return module


def _model_state(engine: Engine) -> dict[str, Tensor]:
    """Parameters and persistent buffers by name: live tensors. Transformer Engine's fp8 metadata is left out."""
    state = _unwrapped(engine).state_dict(keep_vars=False)
    return {name: value for name, value in state.items() if isinstance(value, Tensor) and "_extra_state" not in name}


def _parameter_names(engine: Engine) -> dict[nn.Parameter, str]:
    return {parameter: name for name, parameter in _unwrapped(engine).named_parameters() if parameter.requires_grad}


def _placements(engine: Engine) -> list[ParameterPlacement]:
    """Where each parameter of this rank stands in the whole model, for resharding without Megatron."""
    from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

    offset = get_transformer_layer_offset(engine.config)
    tied = engine.config.share_embeddings_and_output_weights
    placements = []
    for name, parameter in _unwrapped(engine).named_parameters():
        is_vocabulary = name in ("embedding.word_embeddings.weight", "output_layer.weight")
        placements.append(
            place_parameter(
                name,
                parameter,
                stage="first" if name.startswith("embedding.") else "last",
                layer_offset=offset,
                # Megatron-Core does not mark the fused gate and up projection on every path.
                partition_stride=2 if ".linear_fc1." in name and engine.config.gated_linear_unit else None,
                vocabulary_rows=engine.handle.vocab_size if is_vocabulary else None,
                last_stage_copy="output_layer.weight" if tied and name.startswith("embedding.word") else None,
            )
        )
    return placements
