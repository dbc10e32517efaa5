"""What the last pipeline stage makes of a micro-batch's logits, and how every rank gets to know it."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from mbridge_model.transfer import to_device
from torch import Tensor, distributed

from mbridge_train.engine.collate import ModelInputs
from mbridge_train.layout import RankLayout
from mbridge_train.losses.logprob import vocab_parallel_logprob_and_entropy
from mbridge_train.losses.policy import LossInputs, LossOutputs, combine_metrics, is_maximum, mean_metrics

LossFunction = Callable[[LossInputs], LossOutputs]
Outputs = Callable[[ModelInputs, Tensor, Tensor | None], tuple[Tensor, dict[str, Any]]]
"""Maps a micro-batch, its log probabilities and entropies to a loss and to results."""


def logprobs_and_entropies(
    inputs: ModelInputs,
    layout: RankLayout,
    vocab_size: int,
    temperature: float,
    with_entropy: bool,
    logits: Tensor,
) -> tuple[Tensor, Tensor | None]:
    """Each [batch * sequence]; `logits` are [sequence, batch, padded vocabulary / TP], and their gradient overwrites
    them."""
    length, batch, vocab = logits.shape
    values = vocab_parallel_logprob_and_entropy(
        logits.flatten(0, 1),
        inputs.targets.t().reshape(-1),
        group=layout.tensor.group,
        vocab_start=layout.tensor.rank * vocab,
        vocab_size=vocab_size,
        temperature=temperature,
        with_entropy=with_entropy,
        overwrite=True,
    )
    logprobs, entropy = (None if value is None else value.view(length, batch).t().reshape(-1) for value in values)
    assert logprobs is not None
    return logprobs, entropy


def loss_outputs(
    loss: LossFunction, inputs: ModelInputs, logprobs: Tensor, entropy: Tensor | None
) -> tuple[Tensor, dict[str, Any]]:
    """`Outputs` of a loss: its value and its metrics."""

    def flat(values: Tensor | None) -> Tensor | None:
        return None if values is None else values.reshape(-1)

    result = loss(
        LossInputs(
            logprobs=logprobs,
            weights=inputs.weights.reshape(-1),
            entropy=entropy,
            advantages=flat(inputs.advantages),
            old_logprobs=flat(inputs.old_logprobs),
            reference_logprobs=flat(inputs.reference_logprobs),
        )
    )
    return result.loss, result.metrics


def logprob_outputs(inputs: ModelInputs, logprobs: Tensor, entropy: Tensor | None) -> tuple[Tensor, dict[str, Any]]:
    """`Outputs` of no loss: log probabilities of each sample."""
    return logprobs.sum(), {"per_sample": inputs.unpack(logprobs)}


class Metrics(Mapping[str, float]):
    """What `mean_metrics` gives, on its way from the device until it is first looked at.

    Whoever takes the optimizer's step before that has it launched while the GPU still computes gradients. The copy is
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
    """Metrics of all micro-batches on all ranks, on every rank. Without pipeline stages the host waits for nothing."""
    names = [sorted(per_micro_batch[0]) if per_micro_batch else []]
    if layout.pipeline.size > 1:
        distributed.broadcast_object_list(names, src=layout.pipeline.last_rank, group=layout.pipeline.group)
    values = torch.zeros(len(names[0]), device=device, dtype=torch.float64)
    if layout.is_last_stage:
        combined = combine_metrics(per_micro_batch)
        values = torch.stack([combined[name].double() for name in names[0]])
        group = layout.data_context.group
        maxima = to_device(torch.tensor([is_maximum(name) for name in names[0]]), device)
        largest = values.clone()
        distributed.all_reduce(largest, op=distributed.ReduceOp.MAX, group=group)
        distributed.all_reduce(values, group=group)
        values = values.where(~maxima, largest)
    broadcast_from_last_stage(values, layout)
    return Metrics(names[0], values)


def broadcast_from_last_stage(values: Tensor, layout: RankLayout) -> None:
    """Broadcast `values` over the pipeline stages, in place."""
    if layout.pipeline.size > 1:
        distributed.broadcast(values, src=layout.pipeline.last_rank, group=layout.pipeline.group)
