"""The layout of ranks: every parallel axis, this rank's place on it, and its process group.

Megatron-Core keeps its process groups in globals. They are read here and nowhere else in this package; whoever saves,
loads, plans or reduces asks `Engine.layout`. Before a model exists, the layout is the user's wish: `build_engine` makes
`mbridge_model.Parallel` from the config.
"""

from dataclasses import dataclass

import mbridge_ckpt
from megatron.core import parallel_state
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import distributed
from torch.distributed import ProcessGroup


@dataclass(frozen=True, slots=True)
class Axis:
    """One parallel axis as this rank sees it: the ranks that differ from it on this axis alone, and itself.

    Attributes:
        group: these ranks.
        size: their number.
        rank: this rank's place among them, from 0.
    """

    group: ProcessGroup
    size: int
    rank: int

    @classmethod
    def of(cls, group: ProcessGroup) -> "Axis":
        """Return the axis whose ranks are those of `group`."""
        return cls(group, group.size(), group.rank())

    @property
    def is_first(self) -> bool:
        """Whether this is the first rank of the axis."""
        return self.rank == 0

    @property
    def is_last(self) -> bool:
        """Whether this is the last rank of the axis."""
        return self.rank == self.size - 1

    @property
    def last_rank(self) -> int:
        """Rank in the world of the last rank of the axis."""
        return distributed.get_global_rank(self.group, self.size - 1)


@dataclass(frozen=True, kw_only=True, slots=True)
class RankLayout:
    """All axes of this run's ranks.

    Attributes:
        tensor: ranks that share each layer's matrices.
        pipeline: ranks that hold successive stages of the model.
        data: ranks that hold the same parameters and run different samples.
        context: ranks that hold different parts of the same sequences.
        data_context: the two axes above as one: ranks that hold the same parameters and see different tokens. A sum
            over all tokens of a batch is a sum over it.
        expert: ranks that hold different experts of a layer.
        expert_tensor: ranks that share the matrices of an expert.
        expert_data: ranks that hold the same experts.
        data_gloo: the ranks of `data` in a group that moves CPU tensors and Python objects.
        world_gloo: likewise all ranks.
        virtual_pipeline: model chunks of each pipeline stage; 1: no interleaving.
        has_experts: whether the model is a mixture of experts; a dense model has no experts that ranks could share.
        sequence: whether activations between the layers are split along the sequence over `tensor`.
    """

    tensor: Axis
    pipeline: Axis
    data: Axis
    context: Axis
    data_context: Axis
    expert: Axis
    expert_tensor: Axis
    expert_data: Axis
    data_gloo: ProcessGroup
    world_gloo: ProcessGroup
    virtual_pipeline: int
    has_experts: bool
    sequence: bool

    @classmethod
    def of_model(cls, config: TransformerConfig, *, chunks: int) -> "RankLayout":
        """Return the layout of Megatron-Core's process groups, which must exist, and of a model built on them.

        Collective over all ranks.

        Args:
            config: the model's.
            chunks: its number of chunks on this rank.
        """
        return cls(
            tensor=Axis.of(parallel_state.get_tensor_model_parallel_group()),
            pipeline=Axis.of(parallel_state.get_pipeline_model_parallel_group()),
            data=Axis.of(parallel_state.get_data_parallel_group()),
            context=Axis.of(parallel_state.get_context_parallel_group()),
            data_context=Axis.of(parallel_state.get_data_parallel_group(with_context_parallel=True)),
            expert=Axis.of(parallel_state.get_expert_model_parallel_group()),
            expert_tensor=Axis.of(parallel_state.get_expert_tensor_parallel_group()),
            expert_data=Axis.of(parallel_state.get_expert_data_parallel_group()),
            data_gloo=parallel_state.get_data_parallel_group_gloo(),
            world_gloo=_world_gloo(),
            virtual_pipeline=chunks,
            has_experts=bool(config.num_moe_experts),
            sequence=config.sequence_parallel,
        )

    @property
    def is_first_stage(self) -> bool:
        """Whether this rank holds the embedding, and the vision tower where there is one."""
        return self.pipeline.is_first

    @property
    def is_last_stage(self) -> bool:
        """Whether this rank holds the output layer."""
        return self.pipeline.is_last

    @property
    def is_writer(self) -> bool:
        """Whether this rank writes the parameters and optimizer state that its data-parallel ranks hold alike."""
        return self.data.is_first

    @property
    def checkpoint(self) -> mbridge_ckpt.Layout:
        """The sizes, in the type that `mbridge_ckpt` writes into a checkpoint's manifest."""
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
    """Return the world if it runs on gloo already, else a new group of all ranks that does."""
    world = distributed.group.WORLD
    if world is not None and distributed.get_backend() == "gloo":
        return world
    return distributed.new_group(backend="gloo")
