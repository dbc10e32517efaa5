"""Convert optimizer state to whole tensors by parameter name and back, however the optimizer keeps it in memory.

Megatron-Core's distributed optimizer keeps flat slices of buckets and writes files that only the same layout can read.
Here each parameter of a model-parallel rank has its fp32 master copy and its two moments under its name and in its
shape, so that a checkpoint can be resharded and read without Megatron.
"""

from collections.abc import Callable, Iterator
from copy import deepcopy
from functools import partial
from typing import Any

import torch
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor, nn

from mbridge_train.layout import RankLayout
from mbridge_train.optim.optimizer import Optimizer

MOMENTS = ("exp_avg", "exp_avg_sq")
MASTER = "fp32_param"


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
            for parameter, slot in _slots(part, gathered):
                for key, flat_key in _flat_keys():
                    state[key][names[parameter]] = slot(flat_key).view(parameter.shape).clone()
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
    return {
        "step": _adam_step(optimizer),
        "schedule_step": optimizer.steps,
        # A copy, since the state holds the live scale.
        "grad_scaler": deepcopy(scaler.state_dict()) if scaler is not None else None,
    }


@torch.no_grad()
def restore(
    optimizer: Optimizer, names: dict[nn.Parameter, str], layout: RankLayout, state: dict[str, Any] | None
) -> None:
    """Put a state of `collect` back; the model's weights must be loaded already. Collective over data-parallel ranks.

    Args:
        optimizer: freshly built, or in use.
        names, layout: as in `collect`.
        state: on data-parallel rank 0; ignored on the others.
    """
    # Every data-parallel rank needs the small facts; Megatron-Core scatters the tensors.
    facts_of_state = {key: value for key, value in (state or {}).items() if key not in (MASTER, *MOMENTS)}
    shared = _broadcast(facts_of_state, layout)
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


def _adam_step(optimizer: Optimizer) -> int:
    return max(int(group.get("step", 0)) for part in optimizer.parts for group in part.optimizer.param_groups)


@torch.no_grad()
def _ensure_moments(part: Any) -> None:
    """Give every parameter without moments zeros. (A step with zero gradients would also decay the weights.)"""
    for group in part.optimizer.param_groups:
        for parameter in group["params"]:
            if not part.optimizer.state[parameter]:
                part.optimizer.state[parameter] = {key: torch.zeros_like(parameter) for key in MOMENTS}


def _flat_keys() -> tuple[tuple[str, str], ...]:
    """Return pairs of our name and Megatron-Core's."""
    return ((MASTER, "param"), *((key, key) for key in MOMENTS))


def _slots(part: DistributedOptimizer, state: dict[Any, Any]) -> Iterator[tuple[nn.Parameter, Callable[[str], Tensor]]]:
    """Yield each parameter of the optimizer, and a function from Megatron-Core's key to its slice of the flat state.

    The flat tensors hold the buckets of a buffer one after another, without the padding at each bucket's end.
    """
    for number, (buffer, ranges) in enumerate(zip(part.buffers, part.gbuf_ranges, strict=True)):
        dtype = next(iter(ranges))
        flat = state[number][dtype]
        starts = [0]
        for bucket in buffer.buckets:
            starts.append(starts[-1] + bucket.numel_unpadded)
        for parameter, (start, end, bucket_number) in buffer.param_index_map.items():
            begin = starts[bucket_number] + start - buffer.buckets[bucket_number].offset
            yield parameter, partial(_slot, flat, begin, end - start)


def _slot(flat: dict[str, Tensor], begin: int, size: int, key: str) -> Tensor:
    return flat[key][begin : begin + size]


def _flatten(part: DistributedOptimizer, names: dict[nn.Parameter, str], state: dict[str, Any]) -> dict[Any, Any]:
    """Return Megatron-Core's flat state from the state by name, the inverse of `_slots`."""
    flat_state: dict[Any, Any] = {"buckets_coalesced": True}
    for number, (buffer, ranges) in enumerate(zip(part.buffers, part.gbuf_ranges, strict=True)):
        size = buffer.numel_unpadded
        flat: dict[str, Any] = {flat_key: torch.zeros(size) for _, flat_key in _flat_keys()}
        flat_state[number] = {next(iter(ranges)): flat | {"numel_unpadded": size}}
    for parameter, slot in _slots(part, flat_state):
        for key, flat_key in _flat_keys():
            slot(flat_key).copy_(state[key][names[parameter]].flatten())
    return flat_state
