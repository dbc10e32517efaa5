"""Metrics and per-sample values of micro-batches, combined on every rank."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property

import torch
from mbridge_model.vision.inputs import to_device
from torch import Tensor, distributed

from mbridge_train.layout import RankLayout


def combine_metrics(parts: Iterable[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Combine metrics of several micro-batches: the maximum of each ``max_…``, the sum of each other."""
    total: dict[str, Tensor] = {}
    for part in parts:
        for name, value in part.items():
            combine = torch.maximum if is_maximum(name) else torch.add
            total[name] = combine(total[name], value) if name in total else value
    return total


def is_maximum(name: str) -> bool:
    """Return whether a metric combines by maximum instead of by sum."""
    return name.startswith("max_")


def mean_metrics(metrics: Mapping[str, Tensor | float]) -> dict[str, float]:
    """Return combined metrics to log: weighted means of per-token values, losses and maxima unchanged, no ``weight``.

    The weights of a global batch sum to 1 for token-mean and seq-mean-token-mean, where means equal the sums; for
    seq-mean-token-sum, sums over a sequence become means over tokens. Means are 0 if the weights sum to 0.
    """
    weight = float(metrics["weight"])
    unchanged = ("loss", "policy_loss")
    return {
        name: float(value) if name in unchanged or is_maximum(name) else (float(value) / weight if weight else 0.0)
        for name, value in metrics.items()
        if name != "weight"
    }


class Metrics(Mapping[str, float]):
    """The result of `mean_metrics`, whose copy from the device stays in flight until it is first read.

    So the optimizer step can be launched while the GPU still computes gradients. The copy is issued at once; issued
    later, it would wait for that step, too. `values`: float64 [names] on the device.
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

    The host waits for the device only if there are several pipeline stages.
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

    By name, these are one float32 CPU tensor [length, ...] per sample, in the order of the batch.

    Args:
        per_micro_batch: on the last stage, for each micro-batch of this rank, by name: an empty tensor, which has the
            shape, and a tensor [length, ...] per sample.
        micro_batches: indices of the samples of each micro-batch.
        lengths: number of tokens of each sample of the global batch.
    """
    first = per_micro_batch[0] if per_micro_batch else {}
    shapes = _from_last_stage({name: tuple(values[0].shape[1:]) for name, values in first.items()}, layout)
    ends = torch.tensor(lengths).cumsum(0).tolist()
    gathered = {}
    for name, shape in shapes.items():
        # Each sample is filled in on one data-parallel rank, so an all-reduce assembles the batch.
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
    """Return the last stage's `value` on every stage."""
    shared = [value]
    if layout.pipeline.size > 1:
        distributed.broadcast_object_list(shared, src=layout.pipeline.last_rank, group=layout.pipeline.group)
    return shared[0]


def _broadcast(values: Tensor, layout: RankLayout) -> None:
    """Broadcast the last stage's `values` over the pipeline stages, in place."""
    if layout.pipeline.size > 1:
        distributed.broadcast(values, src=layout.pipeline.last_rank, group=layout.pipeline.group)
