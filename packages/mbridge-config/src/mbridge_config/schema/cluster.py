"""Where a run is placed: hosts and processes."""

import dataclasses
from typing import Any

from mbridge_config.schema.keys import key, no_effect

_PLACEMENT = "every rank trains, generates and scores; components are not placed on GPUs of their own"
_PROFILING = "actor.megatron.use_profiler records what a run does"


@dataclasses.dataclass(kw_only=True, slots=True)
class ClusterConfig:
    """`cluster`: the hosts."""

    num_nodes: int = key(
        1, "Hosts of the run; more than one uses the elastic launcher's rendezvous.", unit="hosts", minimum=1
    )
    component_placement: dict[str, Any] = no_effect({}, _PLACEMENT)
    node_groups: list[Any] | None = no_effect(None, _PLACEMENT)
    tracer: dict[str, Any] = no_effect({}, _PROFILING)
    profiling: dict[str, Any] = no_effect({}, _PROFILING)
    auto_scheduler: bool | None = no_effect(None, _PLACEMENT)
    assign_policy: str | None = no_effect(None, _PLACEMENT)
    use_pre_process_policy: bool | None = no_effect(None, _PLACEMENT)
    rollout_use_all_gpus: bool | None = no_effect(None, _PLACEMENT)
    monitor_interval: float | None = no_effect(None, _PLACEMENT)
    preprocess_threshold: float | None = no_effect(None, _PLACEMENT)
    migrate_out_max_bs: int | None = no_effect(None, _PLACEMENT)
    use_wait_before_last_iter_policy: bool | None = no_effect(None, _PLACEMENT)
    fuse_rollout_inference_only: bool | None = no_effect(None, _PLACEMENT)
    recreate_nccl_groups: bool | None = no_effect(None, _PLACEMENT)


@dataclasses.dataclass(kw_only=True, slots=True)
class LauncherConfig:
    """`launcher`: how the processes of one host are started."""

    nproc_per_node: int | None = key(
        None,
        "Processes on this host. null: one for each GPU, one on a host without GPUs. "
        "Ignored where torchrun or SLURM already started the ranks.",
        unit="processes",
        minimum=1,
    )
