"""Convert a tree that Megatron-LM wrote (`--ckpt-format torch`) to a checkpoint, tensor by tensor.

Virtual pipeline chunks become separate stages, and the experts of all expert ranks are merged, so that every reader of
our checkpoints (reshard, diff, export-hf, a resumed run) can read the result.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING

from mbridge_ckpt.errors import CorruptCheckpointError, LayoutError
from mbridge_ckpt.formats.torch_zip import LazyTensor
from mbridge_ckpt.manifest.layout import Layout, model_file, optimizer_file
from mbridge_ckpt.manifest.placement import ParameterPlacement
from mbridge_ckpt.megatron_lm.names import EMBEDDING, OUTPUT_LAYER, NamedParameter
from mbridge_ckpt.megatron_lm.optimizer import RankOptimizer, read_optimizer
from mbridge_ckpt.megatron_lm.pickles import argument
from mbridge_ckpt.megatron_lm.tree import MegatronTree, ModelStage
from mbridge_ckpt.store.transaction import Save, begin_save
from mbridge_ckpt.store.whole_model import MASTER, MOMENTS

if TYPE_CHECKING:
    from torch import Tensor

Placed = tuple[int, NamedParameter, ParameterPlacement]
"""An expert rank, a parameter in its file, and the placement in ours."""


def import_megatron(
    source: str | Path,
    directory: str | Path,
    *,
    optimizer: bool = True,
    vocabulary_rows: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> Path:
    """Write the tree `source` as a committed checkpoint into the checkpoints directory `directory`.

    Args:
        source: the directory of Megatron-LM's `--save` (its newest iteration is read), or that of one iteration.
        directory: gets `global_step_<iteration>`, which must not exist.
        optimizer: import the optimizer state too; it is refused if it cannot be mapped to parameters with certainty.
        vocabulary_rows: real tokens, the first rows of embedding and output layer; by default all stored rows, since a
            tree does not tell which of them are padding.
        progress: called with the bytes of each tensor written.

    Before anything is written, names and shapes are compared across ranks, replicated parameters bit by bit, and master
    weights with weights. Memory: a few tensors of the largest. Returns the new checkpoint.

    Raises CheckpointError's classes, naming the file and the parameter: CorruptCheckpointError and
    UnsafeCheckpointError (a file), IncompleteCheckpointError (a rank is missing), LayoutError (cannot be mapped).
    """
    with MegatronTree(source) as tree:
        tied = _check_ends(tree)
        for stage in tree.stages:
            _check_ranks(tree, stage)
        rows = _vocabulary_rows(tree, vocabulary_rows)
        placements = [_placements(tree, stage, rows, tied) for stage in tree.stages]
        states: dict[tuple[int, int, int], RankOptimizer] = {}
        if optimizer:
            for rank in product(range(tree.tensor), range(tree.pipeline), range(tree.expert)):
                states[rank] = read_optimizer(tree, rank, tied=tied)
        layout = Layout(
            tensor=tree.tensor,
            pipeline=len(tree.stages),
            data=max(1, argument(tree.arguments, "data_parallel_size", int) or 1),
            context=max(1, argument(tree.arguments, "context_parallel_size", int) or 1),
        )
        origin = {
            "format": "megatron-lm torch",
            "directory": str(tree.directory.absolute()),
            "pipeline": tree.pipeline,
            "virtual_pipeline": tree.virtual_pipeline,
            "expert": tree.expert,
            "optimizer": optimizer,
        }
        samples = argument(tree.arguments, "consumed_train_samples", int)
        origin |= {"consumed_train_samples": samples} if samples is not None else {}
        with begin_save(directory, step=tree.iteration, layout=layout, existing="refuse") as save:
            for number, stage in enumerate(tree.stages):
                for tensor_rank in range(tree.tensor):
                    _write(save, tree, stage, placements[number], states, number, tensor_rank, progress)
            return save.commit({"imported_from": origin})


def _check_ends(tree: MegatronTree) -> bool:
    """Return whether the output layer is tied to the embedding; check the first and the last stage."""
    first, last = tree.stages[0], tree.stages[-1]
    names = {parameter.name for parameter in first.parameters}, {parameter.name for parameter in last.parameters}
    where = tree.path((0, last.pipeline_rank, 0))
    if EMBEDDING not in names[0]:
        raise LayoutError(f"{tree.path((0, 0, 0))}: {first.key!r} has no {EMBEDDING}; the tree is no GPT model")
    if not any(name.startswith("decoder.final_") for name in names[1]):
        raise LayoutError(f"{where}: {last.key!r} has no final norm; the last pipeline stage seems to be missing")
    untied = argument(tree.arguments, "untie_embeddings_and_output_weights", bool)
    if OUTPUT_LAYER not in names[1]:
        if untied or len(tree.stages) > 1:
            raise LayoutError(f"{where}: {OUTPUT_LAYER} is missing")
        return True
    if len(tree.stages) == 1:
        return False
    alike = all(
        _equal(tree.read(first, EMBEDDING, rank), tree.read(last, OUTPUT_LAYER, rank)) for rank in range(tree.tensor)
    )
    if untied is False and not alike:
        raise CorruptCheckpointError(f"{where}: {OUTPUT_LAYER} differs from {EMBEDDING}, to which the run tied it")
    return alike and not untied


def _check_ranks(tree: MegatronTree, stage: ModelStage) -> None:
    """Check that all tensor and expert ranks have the same names and shapes, and equal values where they should."""
    own = tree.weights(stage, 0, 0)
    shapes = {name: (tensor.shape, tensor.dtype) for name, tensor in own.items()}
    others = list(product(range(tree.tensor), range(tree.expert)))[1:]
    for tensor_rank, expert_rank in others:
        where = tree.path((tensor_rank, stage.pipeline_rank, expert_rank))
        theirs = {n: (t.shape, t.dtype) for n, t in tree.weights(stage, tensor_rank, expert_rank).items()}
        different = [name for name in {**shapes, **theirs} if shapes.get(name) != theirs.get(name)]
        if different:
            name = different[0]
            raise LayoutError(f"{where}: {name} is {theirs.get(name)}, on the first rank {shapes.get(name)}")
    for parameter in stage.parameters:
        whole = parameter.cut in ("whole", "buffer")
        for tensor_rank, expert_rank in others:
            # Experts differ from expert rank to expert rank; anything else is held alike there.
            model = (0 if whole else tensor_rank, expert_rank if parameter.expert is not None else 0)
            if model == (tensor_rank, expert_rank):
                continue
            name = parameter.name
            if not _equal(tree.read(stage, name, *model), tree.read(stage, name, tensor_rank, expert_rank)):
                raise CorruptCheckpointError(
                    f"{tree.path((tensor_rank, stage.pipeline_rank, expert_rank))}: {name} differs from that of"
                    f" tensor rank {model[0]}, expert rank {model[1]}, though these ranks hold the same copy"
                )


def _equal(one: "Tensor", other: "Tensor") -> bool:
    import torch

    return one.shape == other.shape and torch.equal(
        one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8)
    )


def _vocabulary_rows(tree: MegatronTree, given: int | None) -> int:
    stored = tree.weights(tree.stages[0], 0)[EMBEDDING].shape[0] * tree.tensor
    said = argument(tree.arguments, "padded_vocab_size", int)
    if said is not None and said != stored:
        raise LayoutError(f"{tree.directory}: {EMBEDDING} has {stored} rows, the run had padded_vocab_size={said}")
    if given is not None and not 0 < given <= stored:
        raise LayoutError(
            f"vocabulary size {given}: {EMBEDDING} of {tree.directory} has {stored} rows; give at most that"
        )
    return given or stored


def _placements(tree: MegatronTree, stage: ModelStage, vocabulary_rows: int, tied: bool) -> list[Placed]:
    """Return what goes into one file of ours: all parameters of the first expert rank, and the others' experts."""
    local = {parameter.expert for parameter in stage.parameters if parameter.expert is not None}
    placed = []
    for expert_rank, parameter in product(range(tree.expert), stage.parameters):
        if expert_rank and parameter.expert is None:
            continue
        placement = parameter.placement(
            layer_offset=stage.layer_offset,
            expert_offset=expert_rank * len(local),
            stride=_stride(tree, stage, parameter),
        )
        if parameter.name in (EMBEDDING, OUTPUT_LAYER):
            copy = OUTPUT_LAYER if tied and parameter.name == EMBEDDING else None
            placement = replace(placement, vocabulary_rows=vocabulary_rows, last_stage_copy=copy)
        placed.append((expert_rank, parameter, placement))
    return placed


def _stride(tree: MegatronTree, stage: ModelStage, parameter: NamedParameter) -> int:
    """Return 2 for a gated linear unit, whose first layer has twice as many rows as its second has columns, else 1."""
    if parameter.cut != "gated_rows":
        return 1
    weights = tree.weights(stage, 0)
    down_projection = parameter.name.replace(".linear_fc1.", ".linear_fc2.").replace(".bias", ".weight")
    second = weights.get(down_projection)
    rows = weights[parameter.name].shape[0]
    columns = second.shape[1] if second is not None and len(second.shape) == 2 else 0
    if not columns or rows not in (columns, 2 * columns):
        raise LayoutError(
            f"{tree.path((0, stage.pipeline_rank, 0))}: {parameter.name} has {rows} rows and"
            f" {down_projection} {columns} columns; expected as many, or half as many"
        )
    return rows // columns


def _write(
    save: Save,
    tree: MegatronTree,
    stage: ModelStage,
    placements: list[Placed],
    states: dict[tuple[int, int, int], RankOptimizer],
    number: int,
    tensor_rank: int,
    progress: Callable[[int], None] | None,
) -> None:
    ranks = {"tensor_rank": tensor_rank, "pipeline_rank": number}
    model: dict[str, LazyTensor] = {}
    state: dict[str, dict[str, LazyTensor]] = {kind: {} for kind in (MASTER, *MOMENTS)}
    weights = [tree.weights(stage, tensor_rank, expert_rank) for expert_rank in range(tree.expert)]
    for expert_rank, parameter, placement in placements:
        stored = weights[expert_rank][parameter.name]
        read = partial(tree.read, stage, parameter.name, tensor_rank, expert_rank)
        model[placement.name] = LazyTensor(stored.shape, stored.dtype, read).counted(progress)
        if states and parameter.cut != "buffer":
            found = states[tensor_rank, stage.pipeline_rank, expert_rank].state[stage.key, parameter.name]
            for kind, piece in found.items():
                state[kind][placement.name] = piece.counted(progress)
    content = {"model": model, "iteration": tree.iteration, "layout": save.layout.to_json()}
    placed = [placement for _, _, placement in placements]
    save.write_torch(model_file(save.step, save.layout, **ranks), content, placements=placed)
    if states:
        facts = states[tensor_rank, stage.pipeline_rank, 0]
        # Megatron-LM counts the schedule in samples; a step that fp16 skips moves neither it nor Adam.
        counts = {"step": facts.step, "schedule_step": facts.step, "grad_scaler": facts.grad_scaler}
        save.write_torch(optimizer_file(save.step, save.layout, **ranks), state | counts)
