"""Where a parameter of a rank's file belongs in the whole model: all that resharding needs, without Megatron."""

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

from mbridge_ckpt.errors import LayoutError

if TYPE_CHECKING:
    from torch import Tensor

Stage = Literal["first", "layer", "last", "every"]
_LAYER = re.compile(r"((?:^|.*\.)decoder\.layers\.)([0-9]+)(\..*)")
_EXPERT = re.compile(r"(.*\.local_experts\.)([0-9]+)(\..*)")


@dataclass(frozen=True, kw_only=True, slots=True)
class ParameterPlacement:
    """One parameter in the file of a model-parallel rank.

    name: its key in that file, with the layer index local to the stage or model chunk (Megatron-Core's numbering); a
        rank with several chunks (virtual pipeline) prefixes the names of each.
    global_name: the same with the layer and expert numbers of the whole model; unique in the model.
    stage: where pipelining puts it: "first" (embedding, vision tower), "last" (final norm, output layer), "layer"
        (with its transformer layer) or "every" (a copy on each stage).
    layer: global layer number, counted from 0; None unless stage is "layer".
    expert: global expert number of an expert's own parameter; None otherwise.
    partition_dim: the dimension cut by tensor parallelism; -1 for a parameter that every tensor rank holds whole.
    partition_stride: number of equal blocks along `partition_dim` that are cut separately; each rank has its piece of
        every block (Megatron's `partition_stride`). 1: one contiguous piece per rank (attention's fused query-key-value
        is grouped by key-value head and so needs no more). 2: gated linear units, [gate; up] pieces on each rank.
    vocabulary_rows: rows of dimension 0 that are real tokens, for embedding and output layer, whose row count is
        padded to fit the tensor-parallel size; None otherwise.
    last_stage_copy: for a tied embedding, the name under which the last stage holds a copy where it is not the first.
    """

    name: str
    global_name: str
    stage: Stage
    layer: int | None = None
    expert: int | None = None
    partition_dim: int = -1
    partition_stride: int = 1
    vocabulary_rows: int | None = None
    last_stage_copy: str | None = None

    def __post_init__(self) -> None:
        if self.stage not in get_args(Stage):
            raise LayoutError(f"{self.name}: stage {self.stage!r} is none of {', '.join(get_args(Stage))}")
        if (self.layer is not None) != (self.stage == "layer"):
            raise LayoutError(
                f"{self.name}: layer is {self.layer} but stage is {self.stage!r}; give a layer number with"
                " stage 'layer' and with no other"
            )
        if self.partition_stride < 1 or (self.partition_dim < 0 and self.partition_stride != 1):
            raise LayoutError(
                f"{self.name}: partition_stride {self.partition_stride} with partition_dim"
                f" {self.partition_dim}; a stride needs a partitioned dimension and is at least 1"
            )


def local_name(placement: ParameterPlacement, layer_offset: int) -> str:
    """Return the name of a layer's parameter in the file of a stage whose first layer is `layer_offset`."""
    match = _LAYER.fullmatch(placement.global_name)
    if not match or placement.layer is None:
        raise LayoutError(f"{placement.global_name}: no 'decoder.layers.N.' in the name of a layer's parameter")
    return f"{match[1]}{placement.layer - layer_offset}{match[3]}"


def place_parameter(
    name: str,
    parameter: "Tensor",
    *,
    stage: Stage,
    prefix: str = "",
    layer_offset: int = 0,
    expert_offset: int = 0,
    partition_stride: int | None = None,
    vocabulary_rows: int | None = None,
    last_stage_copy: str | None = None,
) -> ParameterPlacement:
    """Place one Megatron-Core parameter by its name and the marks that Megatron leaves on it.

    Reads `tensor_model_parallel`, `partition_dim` and `partition_stride` of `parameter`. `prefix` precedes `name` in
    the file. `layer_offset` is the global number of the first layer of the stage (or model chunk), `expert_offset` that
    of the rank's first expert. A name with `decoder.layers.N.` gets stage "layer", except on stage "first", where it is
    a layer of a vision tower. `partition_stride` overrides a mark that is known to be wrong.
    """
    global_name, layer, expert = name, None, None
    if stage != "first" and (match := _LAYER.fullmatch(name)):
        layer = int(match[2]) + layer_offset
        global_name, stage = f"{match[1]}{layer}{match[3]}", "layer"
    if match := _EXPERT.fullmatch(global_name):
        expert = int(match[2]) + expert_offset
        global_name = f"{match[1]}{expert}{match[3]}"
    parallel = bool(getattr(parameter, "tensor_model_parallel", False))
    stride = int(getattr(parameter, "partition_stride", 1)) if partition_stride is None else partition_stride
    return ParameterPlacement(
        name=prefix + name,
        global_name=global_name,
        stage=stage,
        layer=layer,
        expert=expert,
        partition_dim=int(getattr(parameter, "partition_dim", -1)) if parallel else -1,
        partition_stride=stride if parallel else 1,
        vocabulary_rows=vocabulary_rows,
        last_stage_copy=last_stage_copy,
    )
