"""Read a checkpoint into a run whose tensor- or pipeline-parallel sizes differ from those of its writer.

Each rank reads the pieces of its own parameters from the files of all ranks that wrote them
(`mbridge_ckpt.WholeModel`), both weights and optimizer moments; nothing is gathered, and no other copy is written.
"""

from typing import Any

from mbridge_ckpt import LayoutError, ParameterPlacement, WholeModel, optimizer_file
from mbridge_ckpt.store.whole_model import MODEL
from torch import Tensor

from mbridge_train.checkpoint.optimizer_state import MASTER, MOMENTS
from mbridge_train.checkpoint.placement import model_state, parameter_names, placements
from mbridge_train.engine.engine import Engine
from mbridge_train.errors import TrainError


def read_model(engine: Engine, whole: WholeModel) -> dict[str, Tensor]:
    """Read the weights of this rank by its own names, CPU tensors in the shapes of its parameters.

    Raises:
        TrainError: the checkpoint holds other parameters than the model, or in other sizes.
    """
    placed = placements(engine)
    _check_same_model(engine, whole, placed)
    unplaced = sorted(set(model_state(engine)) - {placement.name for placement in placed})
    if unplaced:
        layout = whole.checkpoint.layout
        raise TrainError(
            f"{whole.checkpoint.path}: {unplaced[0]!r} is a buffer of the model, for which a checkpoint does not say "
            f"how the layout cut it; resume with actor.model.tensor_model_parallel_size={layout.tensor} and "
            f"actor.model.pipeline_model_parallel_size={layout.pipeline}"
        )
    return _pieces(engine, whole, MODEL, placed)


def read_optimizer(engine: Engine, whole: WholeModel) -> dict[str, Any]:
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


def _check_same_model(engine: Engine, whole: WholeModel, placed: list[ParameterPlacement]) -> None:
    if difference := _difference(engine, whole, placed):
        raise TrainError(
            f"{whole.checkpoint.path} does not fit this model: it has {difference}; it was written for another model, "
            "or another vocabulary or depth"
        )


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
