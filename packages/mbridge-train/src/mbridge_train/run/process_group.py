"""The process group of a run: joining, seeding, exchanging small objects, leaving.

Megatron-Core's model-parallel groups are created within it when the model is loaded (`mbridge_model.load`).
"""

import os
import random
from datetime import timedelta

import numpy
import torch
from mbridge_model import enable_cpu
from torch import distributed

from mbridge_train.errors import TrainError


def join(timeout_minutes: float = 30.0) -> torch.device:
    """Join the process group that the launcher describes in the environment (RANK, WORLD_SIZE, MASTER_ADDR, ...).

    Idempotent: a group that this process has already joined is kept. Returns the device of this rank: its own GPU with
    nccl, or the CPU with gloo where there is no GPU.
    """
    enable_cpu()
    device, backend = torch.device("cpu"), "gloo"
    if torch.cuda.is_available():
        local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        if local_rank >= torch.cuda.device_count():
            raise TrainError(
                f"local rank {local_rank} has no GPU: this host has {torch.cuda.device_count()}; "
                "start one process per GPU (launcher.nproc_per_node)"
            )
        torch.cuda.set_device(local_rank)
        # gloo beside nccl: checkpoints and Python objects are exchanged on the CPU.
        device, backend = torch.device("cuda", local_rank), "cpu:gloo,cuda:nccl"
    if not distributed.is_initialized():
        bound = device if device.type == "cuda" else None
        distributed.init_process_group(backend, timeout=timedelta(minutes=timeout_minutes), device_id=bound)
    return device


def seed_all(seed: int) -> None:
    """Seed Python, numpy and torch; Megatron-Core's random streams are seeded when its groups are created."""
    random.seed(seed)
    numpy.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def leave() -> None:
    """Destroy model-parallel groups and the process group, so that a later run in this process starts clean."""
    from megatron.core import parallel_state

    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    if distributed.is_initialized():
        distributed.destroy_process_group()


def broadcast[T](value: T) -> T:
    """Return rank 0's `value` on every rank. It is pickled, so it must be small and come from this program."""
    box = [value]
    distributed.broadcast_object_list(box, src=0)
    return box[0]
