"""Joining and leaving the process group that the variables of a launcher describe."""

import os
import random
import socket
from typing import Any

import numpy
import pytest
import torch
from mbridge_model import Parallel
from mbridge_train.errors import TrainError
from mbridge_train.run.process_group import broadcast, join, leave, seed_all

from testing.gang import Gang


def join_and_leave() -> dict[str, Any]:
    """Leave the gang's group and join one by torchrun's variables, twice, ending in a group that the gang can end."""
    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    ports = []
    for _ in range(2):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            ports.append(broadcast(free.getsockname()[1]))
    from mbridge_model.parallel import initialize_parallel
    from megatron.core import parallel_state

    seen, timeouts = [], []
    before = dict(os.environ)
    try:
        for port in ports:
            leave()
            assert not torch.distributed.is_initialized()
            os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_RANK": str(rank)}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            device = join(1.5)
            assert join(1.5) == device  # a second call finds the group
            initialize_parallel(Parallel(tensor=world_size), seed=1)
            tensor: Any = parallel_state.get_tensor_model_parallel_group()
            timeouts.append(tensor._get_backend(device).options._timeout.total_seconds())
            total = torch.tensor([rank + 1.0], device=device)
            torch.distributed.all_reduce(total)
            seen.append((torch.distributed.get_rank(), total.item(), torch.distributed.get_backend()))
        return {"seen": seen, "timeouts": timeouts, "device": device.type, "broadcast": broadcast({"from": rank})}
    finally:
        os.environ.clear()
        os.environ.update(before)


def test_groups_are_joined_and_left(gang2: Gang) -> None:
    for rank, result in enumerate(gang2.run(join_and_leave)):
        if result["device"] == "cpu":
            assert result["seen"] == [(rank, 3.0, "gloo")] * 2
        assert result["broadcast"] == {"from": 0}
        assert result["timeouts"] == [90.0, 90.0]  # Megatron-Core's groups wait as long as that of all ranks


def test_more_ranks_than_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mbridge_train.run.process_group.enable_cpu", lambda: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(TrainError, match=r"local rank 2 has no GPU: this host has 2.*launcher\.nproc_per_node"):
        join()
    assert not torch.distributed.is_initialized()


def test_seeds_repeat() -> None:
    def draw() -> tuple[float, float, float]:
        return random.random(), float(numpy.random.rand()), torch.rand(1).item()

    seed_all(2**40 + 1)  # numpy takes 32 bits alone
    first = draw()
    assert draw() != first
    seed_all(2**40 + 1)
    assert draw() == first
