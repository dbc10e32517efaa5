"""Megatron-Core's own distributed checkpoints, saved and loaded in parallel over gloo."""

from pathlib import Path

import torch

from testing.gang import Gang


def save_and_load(directory: str) -> bool:
    """Runs in a worker. Each rank saves a part, loads a part, and gets the rest from the other rank."""
    from mbridge_model.patches.cpu import enable_cpu

    enable_cpu()
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing import ShardedTensor
    from megatron.core.dist_checkpointing.serialization import get_default_load_sharded_strategy
    from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelLoadStrategyWrapper

    def state(fill: float | None) -> dict[str, ShardedTensor]:
        # Replicated on both ranks: only one of them reads each from disk.
        return {
            name: ShardedTensor.from_rank_offsets(
                name,
                torch.full((3, size), float(size) if fill is None else fill),
                replica_id=torch.distributed.get_rank(),
            )
            for name, size in {"one": 5, "two": 7, "three": 2}.items()
        }

    dist_checkpointing.save(state(None), directory)
    group = torch.distributed.group.WORLD
    strategy = FullyParallelLoadStrategyWrapper(get_default_load_sharded_strategy(directory), group)
    loaded = dist_checkpointing.load(state(0.0), directory, sharded_strategy=strategy)
    return all(torch.equal(loaded[name].data, shard.data) for name, shard in state(None).items())


def test_ranks_exchange_what_they_loaded(gang2: Gang, tmp_path: Path) -> None:
    assert gang2.run(save_and_load, str(tmp_path), timeout=200) == [True, True]
