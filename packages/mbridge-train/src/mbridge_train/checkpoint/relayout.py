"""Read a checkpoint into a run whose tensor- or pipeline-parallel sizes differ from those of its writer.

Each rank reads the pieces of its own parameters from the files of all ranks that wrote them
(`mbridge_ckpt.WholeModel`), both weights and optimizer moments; nothing is gathered, and no other copy is written.
"""

from collections.abc import Iterator
from typing import Any

from mbridge_ckpt import Checkpoint, LayoutError, ParameterPlacement, WholeModel, optimizer_file
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
    own = model_state(engine)
    unplaced = sorted(set(own) - {placement.name for placement in placed})
    if unplaced:
        raise TrainError(
            f"{whole.checkpoint.path}: {unplaced[0]!r} is a buffer of the model, for which a checkpoint does not say "
            f"how the layout cut it; resume with {_sizes(whole.checkpoint)}"
        )
    return dict(
        _pieces(engine, whole, MODEL, placed, {name: tensor.shape[0] for name, tensor in own.items() if tensor.dim()})
    )


def read_optimizer(engine: Engine, whole: WholeModel) -> dict[str, Any]:
    """Read the state of this rank's optimizer in the form of `optimizer_state.collect`."""
    trained = set(parameter_names(engine).values())
    placed = [placement for placement in placements(engine) if placement.name in trained]
    rows = {name: tensor.shape[0] for name, tensor in model_state(engine).items() if tensor.dim()}
    first = optimizer_file(whole.checkpoint.step, whole.checkpoint.layout, tensor_rank=0)
    return whole.load(first) | {key: dict(_pieces(engine, whole, key, placed, rows)) for key in (MASTER, *MOMENTS)}


def _pieces(
    engine: Engine, whole: WholeModel, kind: str, placed: list[ParameterPlacement], rows: dict[str, int]
) -> Iterator[tuple[str, Tensor]]:
    size, rank = engine.layout.tensor.size, engine.layout.tensor.rank
    for placement in placed:
        padded = rows[placement.name] * size if placement.vocabulary_rows is not None else None
        yield placement.name, whole.read(kind, _stored_name(whole, placement), rank=rank, size=size, rows=padded)


def _stored_name(whole: WholeModel, placement: ParameterPlacement) -> str:
    """Return the name in the checkpoint: a tied output layer on a later stage may be stored as the embedding."""
    if placement.global_name in whole.parameters:
        return placement.global_name
    originals = (n for n, p in whole.parameters.items() if p.placement.last_stage_copy == placement.global_name)
    return next(originals, placement.global_name)


def _check_same_model(engine: Engine, whole: WholeModel, placed: list[ParameterPlacement]) -> None:
    names = {_stored_name(whole, placement) for placement in placed}
    missing = sorted(names - set(whole.parameters))
    layers = engine.config.num_layers
    if missing or whole.layers != layers:
        difference = f"no {missing[0]!r}" if missing else f"{whole.layers} layers, the model {layers}"
        raise _other_model(whole, difference)
    own = model_state(engine)
    for placement in placed:
        stored = whole.parameters[_stored_name(whole, placement)].placement
        if stored.vocabulary_rows != placement.vocabulary_rows:
            raise _other_model(
                whole, f"a vocabulary of {stored.vocabulary_rows} tokens, the model {placement.vocabulary_rows}"
            )
        if placement.vocabulary_rows is not None:
            continue
        try:
            shape, _ = whole.shape(MODEL, _stored_name(whole, placement), size=engine.layout.tensor.size)
        except LayoutError as error:
            raise TrainError(str(error)) from None
        if shape != tuple(own[placement.name].shape):
            raise _other_model(
                whole, f"{placement.global_name!r} in shape {shape}, the model {tuple(own[placement.name].shape)}"
            )


def _other_model(whole: WholeModel, difference: str) -> TrainError:
    return TrainError(
        f"{whole.checkpoint.path} does not fit this model: it has {difference}; it was written for another model, or "
        "another vocabulary or depth"
    )


def _sizes(checkpoint: Checkpoint) -> str:
    layout = checkpoint.layout
    return (
        f"actor.model.tensor_model_parallel_size={layout.tensor} and "
        f"actor.model.pipeline_model_parallel_size={layout.pipeline}"
    )
