"""How a model is split over processes."""

import os
from dataclasses import dataclass
from typing import Any

import torch
from torch._C._distributed_c10d import HashStore

from mbridge_model.errors import ModelError


@dataclass(frozen=True, kw_only=True, slots=True)
class Parallel:
    """Sizes of the model-parallel groups. Data parallelism takes what is left of the world size.

    Attributes:
        tensor: ranks that share each layer's matrices.
        pipeline: stages that the layers are divided into.
        sequence: also split activations outside attention and MLP along the sequence, over the tensor ranks.
    """

    tensor: int = 1
    pipeline: int = 1
    sequence: bool = False

    def __post_init__(self) -> None:
        for name in ("tensor", "pipeline"):
            if getattr(self, name) < 1:
                raise ModelError(f"Parallel.{name} is {getattr(self, name)}; it must be at least 1")

    @property
    def model(self) -> int:
        """Ranks that hold one copy of the model."""
        return self.tensor * self.pipeline


def initialize_parallel(parallel: Parallel, seed: int) -> None:
    """Make Megatron-Core's process groups for `parallel` and seed its random streams, unless they exist already.

    Raises:
        ModelError: the world size is not a multiple of tensor x pipeline, groups of other sizes exist, or torchrun's
            variables are incomplete.
    """
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    if not torch.distributed.is_initialized():
        _join_world()
    if not parallel_state.model_parallel_is_initialized():
        world_size = torch.distributed.get_world_size()
        if world_size % parallel.model:
            raise ModelError(
                f"world size {world_size} is not a multiple of tensor x pipeline = {parallel.tensor} x "
                f"{parallel.pipeline} = {parallel.model}; start a multiple of {parallel.model} processes"
            )
        world: Any = torch.distributed.group.WORLD
        timeout = world._get_backend(world._device_types[0]).options._timeout
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=parallel.tensor,
            pipeline_model_parallel_size=parallel.pipeline,
            distributed_timeout_minutes=timeout.total_seconds() / 60,  # not Megatron-Core's half an hour
        )
        model_parallel_cuda_manual_seed(seed)
    existing = (
        parallel_state.get_tensor_model_parallel_world_size(),
        parallel_state.get_pipeline_model_parallel_world_size(),
    )
    if existing != (parallel.tensor, parallel.pipeline):
        raise ModelError(
            f"process groups exist for tensor x pipeline = {existing[0]} x {existing[1]}, but {parallel.tensor} x "
            f"{parallel.pipeline} was asked for; destroy them first or ask for the same"
        )


def _join_world() -> None:
    """Initialize torch.distributed from RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT, or as a world of one.

    So a notebook needs no launcher.
    """
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    if os.environ.get("WORLD_SIZE", "1") == "1":
        torch.distributed.init_process_group(backend, store=HashStore(), rank=0, world_size=1)
        return
    if missing := [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]:
        raise ModelError(
            f"WORLD_SIZE={os.environ['WORLD_SIZE']} says that this process is one rank of several, but "
            f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} not set; start the ranks with "
            f"`torchrun --nproc_per_node={os.environ['WORLD_SIZE']} PROGRAM`, or `unset WORLD_SIZE` to run alone"
        )
    if torch.cuda.is_available():
        local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        if local_rank >= torch.cuda.device_count():
            raise ModelError(
                f"LOCAL_RANK={local_rank} has no GPU: this host has {torch.cuda.device_count()}; start one process a "
                f"GPU, `torchrun --nproc_per_node={torch.cuda.device_count()} PROGRAM`"
            )
        torch.cuda.set_device(local_rank)
    torch.distributed.init_process_group(backend)
