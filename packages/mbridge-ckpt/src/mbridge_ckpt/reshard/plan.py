"""Decide which parameters and how many rows of a vocabulary each rank's file holds under another layout."""

from dataclasses import dataclass, replace
from math import ceil

from mbridge_ckpt.errors import LayoutError
from mbridge_ckpt.huggingface.recipe import RECIPE_FILE, read_recipe
from mbridge_ckpt.manifest.layout import Layout
from mbridge_ckpt.manifest.placement import ParameterPlacement, local_name
from mbridge_ckpt.store.whole_model import MODEL, WholeModel

# Megatron pads a vocabulary to a multiple of one of these times the tensor-parallel size; tried in this order.
_VOCABULARY_MULTIPLES = (128, 1, 2, 4, 8, 16, 32, 64, 256, 512, 1024)


@dataclass(frozen=True, slots=True)
class Target:
    """One parameter in a file to be written: its placement there, and the parameter it is made from."""

    placement: ParameterPlacement
    source: str


def refuse_shared_heads(whole: WholeModel, size: int) -> None:
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


def stage_parameters(whole: WholeModel, layout: Layout, stage: int) -> list[Target]:
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
                inside.append(Target(replace(placement, name=local_name(placement, stage * each)), name))
        elif placement.stage == "every" or (placement.stage == "first" and stage == 0):
            before.append(Target(replace(placement, name=name), name))
        elif placement.stage == "last" and stage == last:
            after.append(Target(replace(placement, name=name), name))
        if placement.last_stage_copy and stage == last and stage != 0:
            copy = placement.last_stage_copy
            own = replace(placement, name=copy, global_name=copy, stage="last", last_stage_copy=None)
            copied.append(Target(own, name))
    inside.sort(key=lambda target: target.placement.layer or 0)  # stable: the order inside a layer stays
    return before + inside + after + copied


def padded_rows(whole: WholeModel, size: int, multiple: int | None) -> dict[str, int]:
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
