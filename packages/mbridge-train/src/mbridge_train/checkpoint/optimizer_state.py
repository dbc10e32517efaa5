"""Convert optimizer state to whole tensors by parameter name and back, however the optimizer keeps it in memory.

Megatron-Core's distributed optimizer keeps flat slices of buckets and writes files that only the same layout can read.
Here each parameter of a model-parallel rank has its fp32 master copy and its two moments under its name and in its
shape, so that a checkpoint can be resharded and read without Megatron.
"""

from collections.abc import Iterator
from copy import deepcopy
from itertools import accumulate
from typing import Any

import torch
from mbridge_ckpt.megatron_lm.optimizer import FLAT_KEYS
from mbridge_ckpt.store.whole_model import MASTER, MOMENTS
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor, nn

from mbridge_train.layout import RankLayout
from mbridge_train.optim.optimizer import Optimizer


def collect(optimizer: Optimizer, names: dict[nn.Parameter, str], layout: RankLayout) -> dict[str, Any] | None:
    """Gather the state on data-parallel rank 0. Collective over the data-parallel group.

    Args:
        optimizer: before its first step the moments are zeros.
        names: each trainable parameter of this rank, and its name.
        layout: of the engine.

    Returns:
        On data-parallel rank 0: {"fp32_param" | "exp_avg" | "exp_avg_sq": {name: float32 CPU tensor in the
        parameter's shape}, "step": Adam's count, "schedule_step": steps of the schedule, "grad_scaler": of fp16 or
        None}. On the others None.
    """
    state: dict[str, Any] = {key: {} for key in (MASTER, *MOMENTS)}
    for part in optimizer.parts:
        if isinstance(part, DistributedOptimizer):
            _ensure_moments(part)
            gathered = part.get_parameter_state_dp_zero()
            if gathered is None:
                continue
            for parameter, key, flat in _flat_slices(part, gathered):
                state[key][names[parameter]] = flat.view(parameter.shape).clone()
        elif layout.is_writer:
            _ensure_moments(part)
            for parameter, name in names.items():
                master = getattr(parameter, "main_param", parameter)
                state[MASTER][name] = master.detach().float().cpu()
                for key in MOMENTS:
                    state[key][name] = part.optimizer.state[master][key].float().cpu()
    if not layout.is_writer:
        return None
    return state | facts(optimizer)


def facts(optimizer: Optimizer) -> dict[str, Any]:
    """Return the state apart from the tensors of parameters, which is the same on every rank; see `collect`."""
    scaler = _grad_scaler(optimizer)
    groups = [group for part in optimizer.parts for group in part.optimizer.param_groups]
    return {
        "step": max(int(group.get("step", 0)) for group in groups),
        "schedule_step": optimizer.steps,
        # A copy, since the state holds the live scale.
        "grad_scaler": deepcopy(scaler.state_dict()) if scaler is not None else None,
    }


@torch.no_grad()
def restore(
    optimizer: Optimizer, names: dict[nn.Parameter, str], layout: RankLayout, state: dict[str, Any] | None
) -> None:
    """Put a state of `collect` back; the model's weights must be loaded already. Collective over data-parallel ranks.

    `names` and `layout` are those of `collect`; `state` is needed on data-parallel rank 0 alone.
    """
    # Every data-parallel rank needs the small facts; Megatron-Core scatters the tensors.
    small = {key: value for key, value in (state or {}).items() if key not in FLAT_KEYS}
    shared = _broadcast(small, layout)
    for part in optimizer.parts:
        _ensure_moments(part)
        if isinstance(part, DistributedOptimizer):
            part.load_parameter_state_from_dp_zero(_flatten(part, names, state) if state is not None else None)
        else:
            values = _broadcast(state or {}, layout)
            for parameter, name in names.items():
                master = getattr(parameter, "main_param", parameter)
                master.copy_(values[MASTER][name])
                for key in MOMENTS:
                    part.optimizer.state[master][key].copy_(values[key][name])
        for group_settings in part.optimizer.param_groups:
            group_settings["step"] = shared["step"]
    optimizer.steps = shared["schedule_step"]
    scaler = _grad_scaler(optimizer)
    if scaler is not None and shared["grad_scaler"] is not None:
        scaler.load_state_dict(shared["grad_scaler"])


def _broadcast(value: dict[str, Any], layout: RankLayout) -> dict[str, Any]:
    """Return the value of data-parallel rank 0."""
    group, box = layout.data_gloo, [value]
    torch.distributed.broadcast_object_list(box, src=torch.distributed.get_global_rank(group, 0), group=group)
    return box[0]


def _grad_scaler(optimizer: Optimizer) -> Any:
    """Return the loss scaler of fp16 training, else None. Parts have it, the chain of optimizers does not."""
    return getattr(optimizer.parts[0], "grad_scaler", None)


@torch.no_grad()
def _ensure_moments(part: Any) -> None:
    """Give every parameter without moments zeros. (A step with zero gradients would also decay the weights.)"""
    for group in part.optimizer.param_groups:
        for parameter in group["params"]:
            if not part.optimizer.state[parameter]:
                part.optimizer.state[parameter] = {key: torch.zeros_like(parameter) for key in MOMENTS}


def _flat_slices(part: DistributedOptimizer, state: dict[Any, Any]) -> Iterator[tuple[nn.Parameter, str, Tensor]]:
    """Yield each parameter of the optimizer with each of our keys, and its slice of Megatron-Core's flat state.

    The flat tensors hold the buckets of a buffer one after another, without the padding at each bucket's end.
    """
    for number, (buffer, ranges) in enumerate(zip(part.buffers, part.gbuf_ranges, strict=True)):
        flat = state[number][next(iter(ranges))]
        starts = [0, *accumulate(bucket.numel_unpadded for bucket in buffer.buckets)]
        for parameter, (start, end, bucket) in buffer.param_index_map.items():
            begin = starts[bucket] + start - buffer.buckets[bucket].offset
            for key, flat_key in FLAT_KEYS.items():
                yield parameter, key, flat[flat_key][begin : begin + end - start]


def _flatten(part: DistributedOptimizer, names: dict[nn.Parameter, str], state: dict[str, Any]) -> dict[Any, Any]:
    """Return Megatron-Core's flat state from the state by name."""
    flat_state: dict[Any, Any] = {"buckets_coalesced": True}
    for number, (buffer, ranges) in enumerate(zip(part.buffers, part.gbuf_ranges, strict=True)):
        size = buffer.numel_unpadded
        flat: dict[str, Any] = {flat_key: torch.zeros(size) for flat_key in FLAT_KEYS.values()}
        flat_state[number] = {next(iter(ranges)): flat | {"numel_unpadded": size}}
    for parameter, key, flat_slice in _flat_slices(part, flat_state):
        flat_slice.copy_(state[key][names[parameter]].flatten())
    return flat_state
