"""Results of micro-batches, combined on every rank: metrics of a loss, and per-sample values."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property

import torch
from mbridge_model.vision.inputs import to_device
from torch import Tensor, distributed

from mbridge_train.layout import RankLayout


def combine_metrics(parts: Iterable[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Combine metrics of several micro-batches or ranks: maxima of ``max_…``, sums of the others."""
    total: dict[str, Tensor] = {}
    for part in parts:
        for name, value in part.items():
            if name not in total:
                total[name] = value
            elif is_maximum(name):
                total[name] = torch.maximum(total[name], value)
            else:
                total[name] = total[name] + value
    return total


def is_maximum(name: str) -> bool:
    """Return whether a metric combines by maximum instead of by sum."""
    return name.startswith("max_")


def mean_metrics(metrics: Mapping[str, Tensor | float]) -> dict[str, float]:
    """Return combined metrics as numbers to log: weighted means of per-token values; losses and maxima as they are.

    For token-mean and seq-mean-token-mean the weights of a global batch sum to 1 and this changes nothing; for
    seq-mean-token-sum it turns sums over a sequence into means over tokens. ``weight`` itself is left out. Means over
    no weight at all are 0.
    """
    weight = float(metrics["weight"])
    unchanged = ("loss", "policy_loss")
    return {
        name: float(value) if name in unchanged or is_maximum(name) else (float(value) / weight if weight else 0.0)
        for name, value in metrics.items()
        if name != "weight"
    }


class Metrics(Mapping[str, float]):
    """The result of `mean_metrics`, in flight from the device until it is first read.

    Code that takes the optimizer's step before reading launches it while the GPU still computes gradients. The copy is
    issued at once: a later one would wait for that step, too.

    Args:
        names: of the combined metrics.
        values: float64 [names] on the device.
    """

    def __init__(self, names: Sequence[str], values: Tensor) -> None:
        self._names = names
        self._values = values
        self._copied: torch.cuda.Event | None = None
        if values.is_cuda:
            self._values = torch.empty_like(values, device="cpu", pin_memory=True).copy_(values, non_blocking=True)
            self._copied = torch.cuda.current_stream(values.device).record_event()

    @cached_property
    def _numbers(self) -> dict[str, float]:
        if self._copied is not None:
            self._copied.synchronize()
        return mean_metrics(dict(zip(self._names, self._values.tolist(), strict=True)))

    def __getitem__(self, name: str) -> float:
        return self._numbers[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._numbers)

    def __len__(self) -> int:
        return len(self._numbers)

    def __repr__(self) -> str:
        return repr(self._numbers)


def reduce_metrics(per_micro_batch: list[dict[str, Tensor]], layout: RankLayout, device: torch.device) -> Metrics:
    """Return the metrics of all micro-batches of all ranks, on every rank.

    Without pipeline stages the host does not wait for the device.
    """
    names = _from_last_stage(sorted(per_micro_batch[0]) if per_micro_batch else [], layout)
    values = torch.zeros(len(names), device=device, dtype=torch.float64)
    if layout.is_last_stage:
        combined = combine_metrics(per_micro_batch)
        values = torch.stack([combined[name].double() for name in names])
        group = layout.data_context.group
        maxima = to_device(torch.tensor([is_maximum(name) for name in names]), device)
        largest = values.clone()
        distributed.all_reduce(largest, op=distributed.ReduceOp.MAX, group=group)
        distributed.all_reduce(values, group=group)
        values = values.where(~maxima, largest)
    _broadcast(values, layout)
    return Metrics(names, values)


def gather_samples(
    per_micro_batch: list[dict[str, list[Tensor]]],
    micro_batches: list[list[int]],
    lengths: Sequence[int],
    layout: RankLayout,
    device: torch.device,
) -> dict[str, list[Tensor]]:
    """Return the values of all samples of a global batch, on every rank.

    Args:
        per_micro_batch: on the last stage, by name for each micro-batch of this rank: an empty tensor, for the shape,
            and a tensor [length, ...] per sample.
        micro_batches: indices of their samples.
        lengths: of all samples.

    Returns:
        By name, one float32 tensor [length, ...] on the CPU per sample, in the batch's order.
    """
    first = per_micro_batch[0] if per_micro_batch else {}
    shapes = _from_last_stage({name: tuple(values[0].shape[1:]) for name, values in first.items()}, layout)
    ends = torch.tensor(lengths).cumsum(0).tolist()
    gathered = {}
    for name, shape in shapes.items():
        # Each sample is filled in on one data-parallel rank, so a sum over ranks assembles the batch.
        values = torch.zeros(sum(lengths), *shape, device=device)
        if layout.is_last_stage:
            for indices, results in zip(micro_batches, per_micro_batch, strict=True):
                for index, result in zip(indices, results[name][1:], strict=True):
                    values[ends[index] - lengths[index] : ends[index]] = result
            distributed.all_reduce(values, group=layout.data_context.group)
        _broadcast(values, layout)
        gathered[name] = list(values.cpu().split(list(lengths)))
    return gathered


def _from_last_stage[T](value: T, layout: RankLayout) -> T:
    """Return the last stage's `value`, on every stage."""
    shared = [value]
    if layout.pipeline.size > 1:
        distributed.broadcast_object_list(shared, src=layout.pipeline.last_rank, group=layout.pipeline.group)
    return shared[0]


def _broadcast(values: Tensor, layout: RankLayout) -> None:
    """Broadcast the last stage's `values` over the pipeline stages, in place."""
    if layout.pipeline.size > 1:
        distributed.broadcast(values, src=layout.pipeline.last_rank, group=layout.pipeline.group)
