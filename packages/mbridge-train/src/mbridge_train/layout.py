"""The layout of ranks: every parallel axis, this rank's place on it, and its process group.

Megatron-Core keeps its process groups in globals. In this package only this module reads them; code that saves, loads,
plans or reduces asks `Engine.layout`. The layout that the user asks for, before a model exists, is
`mbridge_model.Parallel`.
"""

from dataclasses import dataclass

import mbridge_ckpt
from megatron.core import parallel_state
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import distributed
from torch.distributed import ProcessGroup


@dataclass(frozen=True, slots=True)
class Axis:
    """One parallel axis: the group of this rank and those that differ from it on this axis alone; its rank in it."""

    group: ProcessGroup
    size: int
    rank: int

    @classmethod
    def of(cls, group: ProcessGroup) -> "Axis":
        return cls(group, group.size(), group.rank())

    @property
    def last_rank(self) -> int:
        """Global rank of the axis's last rank."""
        return distributed.get_global_rank(self.group, self.size - 1)


@dataclass(frozen=True, kw_only=True, slots=True)
class RankLayout:
    """The parallel axes of a run.

    Attributes:
        tensor: ranks that share each layer's matrices.
        pipeline: ranks that hold successive stages of the model.
        data: ranks that hold the same parameters and run different samples.
        context: ranks that hold different parts of the same sequences.
        data_context: `data` and `context` as one axis: ranks that hold the same parameters and see different tokens.
            Sums over the tokens of a batch are all-reduced over it.
        expert: ranks that hold different experts of a layer.
        expert_tensor: ranks that share the matrices of an expert.
        data_gloo: gloo group of the ranks of `data`, for CPU tensors and Python objects.
        world_gloo: gloo group of all ranks.
        virtual_pipeline: model chunks of each pipeline stage; 1: no interleaving.
        has_experts: whether the model is a mixture of experts. If not, the expert axes mean nothing.
        sequence: whether activations between the layers are split along the sequence over `tensor`.
    """

    tensor: Axis
    pipeline: Axis
    data: Axis
    context: Axis
    data_context: Axis
    expert: Axis
    expert_tensor: Axis
    data_gloo: ProcessGroup
    world_gloo: ProcessGroup
    virtual_pipeline: int
    has_experts: bool
    sequence: bool

    @classmethod
    def of_model(cls, config: TransformerConfig, *, chunks: int) -> "RankLayout":
        """Return the layout of a model of `chunks` chunks on each rank. Collective over all ranks."""
        return cls(
            tensor=Axis.of(parallel_state.get_tensor_model_parallel_group()),
            pipeline=Axis.of(parallel_state.get_pipeline_model_parallel_group()),
            data=Axis.of(parallel_state.get_data_parallel_group()),
            context=Axis.of(parallel_state.get_context_parallel_group()),
            data_context=Axis.of(parallel_state.get_data_parallel_group(with_context_parallel=True)),
            expert=Axis.of(parallel_state.get_expert_model_parallel_group()),
            expert_tensor=Axis.of(parallel_state.get_expert_tensor_parallel_group()),
            data_gloo=parallel_state.get_data_parallel_group_gloo(),
            world_gloo=_world_gloo(),
            virtual_pipeline=chunks,
            has_experts=bool(config.num_moe_experts),
            sequence=config.sequence_parallel,
        )

    @property
    def is_first_stage(self) -> bool:
        """Whether this rank holds the embedding, and the vision tower where there is one."""
        return self.pipeline.rank == 0

    @property
    def is_last_stage(self) -> bool:
        """Whether this rank holds the output layer."""
        return self.pipeline.rank == self.pipeline.size - 1

    @property
    def is_writer(self) -> bool:
        """Whether this rank writes the parameters and optimizer state that its data-parallel ranks share."""
        return self.data.rank == 0

    @property
    def checkpoint(self) -> mbridge_ckpt.Layout:
        """The sizes, as `mbridge_ckpt` writes them into the manifest of a checkpoint."""
        return mbridge_ckpt.Layout(
            tensor=self.tensor.size,
            pipeline=self.pipeline.size,
            virtual_pipeline=self.virtual_pipeline,
            data=self.data.size,
            context=self.context.size,
            expert=self.expert.size if self.has_experts else 1,
            expert_tensor=self.expert_tensor.size if self.has_experts else 1,
        )


def _world_gloo() -> ProcessGroup:
    """Return the default group if it runs on gloo, else a new gloo group of all ranks."""
    world = distributed.group.WORLD
    if world is not None and distributed.get_backend() == "gloo":
        return world
    return distributed.new_group(backend="gloo")
