"""The parallel plan of a run: how ranks, layers and sequences are shared. Integers only, no torch."""

import dataclasses
from typing import Any

from mbridge_config.hf_facts import HFFacts
from mbridge_config.schema.sft import SFTConfig
from mbridge_config.stages import describe_stages, stage_sizes


@dataclasses.dataclass(kw_only=True, slots=True, frozen=True)
class ParallelPlan:
    """Ranks are numbered with tensor parallelism fastest, then data, then pipeline, as Megatron-Core does."""

    world_size: int
    tensor_parallel: int
    pipeline_parallel: int
    data_parallel: int
    layers_per_stage: tuple[int, ...] | None  # None: the model is not known
    stages: tuple[str, ...]  # what each holds, of a vision-language model
    sequences_per_step: int
    optimizer_steps_per_step: int
    global_batch_size: int
    micro_batch_size: int
    micro_batches: int | None  # of one data-parallel rank in one optimizer step; None: by tokens
    max_tokens_per_micro_batch: int

    def __str__(self) -> str:
        stages = "unknown" if self.layers_per_stage is None else ", ".join(map(str, self.layers_per_stage))
        micro = (
            f"up to {self.max_tokens_per_micro_batch} tokens each"
            if self.micro_batches is None
            else f"{self.micro_batches} of {self.micro_batch_size} on each data-parallel rank"
        )
        return (
            f"ranks              {self.world_size} = tensor {self.tensor_parallel} x "
            f"pipeline {self.pipeline_parallel} x data {self.data_parallel}\n"
            f"layers by stage    {stages}\n"
            + "".join(f"stage {number:<12} {holds}\n" for number, holds in enumerate(self.stages))
            + f"sequences a step   {self.sequences_per_step} in {self.optimizer_steps_per_step} "
            f"optimizer step{'' if self.optimizer_steps_per_step == 1 else 's'} of {self.global_batch_size}\n"
            f"micro-batches      {micro}"
        )


def expected_world_size(config: Any) -> int | None:
    """Ranks that the config itself asks for; None where that depends on the host."""
    processes = config.launcher.nproc_per_node
    return None if processes is None else processes * config.cluster.num_nodes


def make_plan(config: Any, facts: HFFacts | None, world_size: int) -> ParallelPlan | None:
    """The plan of `config` on `world_size` ranks; None where layers, ranks or batches cannot be shared evenly."""
    actor, model = config.actor, config.actor.model
    tensor, pipeline = model.tensor_model_parallel_size, model.pipeline_model_parallel_size
    sizes = None if facts is None else stage_sizes(facts.num_layers, pipeline, len(facts.deepstack_visual_indexes))
    if world_size % (tensor * pipeline) or (facts is not None and sizes is None):
        return None
    data = world_size // (tensor * pipeline)
    sequences = actor.global_batch_size
    if not isinstance(config, SFTConfig):
        sequences = config.data.rollout_batch_size * config.algorithm.group_size
    dynamic = config.runner.enable_dynamic_batch_size
    if sequences % actor.global_batch_size or (
        not dynamic and actor.global_batch_size % (data * actor.micro_batch_size)
    ):
        return None
    return ParallelPlan(
        world_size=world_size,
        tensor_parallel=tensor,
        pipeline_parallel=pipeline,
        data_parallel=data,
        layers_per_stage=sizes,
        stages=tuple(describe_stages(sizes, facts.deepstack_visual_indexes))
        if sizes is not None and facts is not None and facts.has_vision
        else (),
        sequences_per_step=sequences,
        optimizer_steps_per_step=sequences // actor.global_batch_size,
        global_batch_size=actor.global_batch_size,
        micro_batch_size=actor.micro_batch_size,
        micro_batches=None if dynamic else actor.global_batch_size // (data * actor.micro_batch_size),
        max_tokens_per_micro_batch=config.runner.max_tokens_per_mbs
        if dynamic
        else config.runner.seq_length * actor.micro_batch_size,
    )
