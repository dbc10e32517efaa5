"""What the last pipeline stage makes of a micro-batch's logits, and how every rank gets to know it."""

from collections.abc import Callable
from typing import Any

import torch
from megatron.core import parallel_state
from torch import Tensor, distributed

from mbridge_train.logprob import vocab_parallel_logprob_and_entropy
from mbridge_train.losses import LossInputs, LossOutputs, combine_metrics, is_maximum, mean_metrics
from mbridge_train.packing import ModelInputs

LossFunction = Callable[[LossInputs], LossOutputs]
Outputs = Callable[[ModelInputs, Tensor, Tensor | None], tuple[Tensor, dict[str, Any]]]
"""Maps a micro-batch, its log probabilities and entropies to a loss and to results."""


def logprobs_and_entropies(
    inputs: ModelInputs, vocab_size: int, temperature: float, with_entropy: bool, logits: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Each [batch * sequence]; `logits` are [sequence, batch, padded vocabulary / TP], and their gradient overwrites
    them."""
    length, batch, vocab = logits.shape
    values = vocab_parallel_logprob_and_entropy(
        logits.flatten(0, 1),
        inputs.targets.t().reshape(-1),
        group=parallel_state.get_tensor_model_parallel_group(),
        vocab_start=parallel_state.get_tensor_model_parallel_rank() * vocab,
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


def reduce_metrics(per_micro_batch: list[dict[str, Tensor]], device: torch.device) -> dict[str, float]:
    """Metrics of all micro-batches on all ranks, as numbers, on every rank."""
    names = [sorted(per_micro_batch[0]) if per_micro_batch else []]
    if parallel_state.get_pipeline_model_parallel_world_size() > 1:
        distributed.broadcast_object_list(
            names,
            src=parallel_state.get_pipeline_model_parallel_last_rank(),
            group=parallel_state.get_pipeline_model_parallel_group(),
        )
    values = torch.zeros(len(names[0]), device=device, dtype=torch.float64)
    if parallel_state.is_pipeline_last_stage():
        combined = combine_metrics(per_micro_batch)
        values = torch.stack([combined[name].double() for name in names[0]])
        group = parallel_state.get_data_parallel_group()
        maxima = torch.tensor([is_maximum(name) for name in names[0]], device=device)
        largest = values.clone()
        distributed.all_reduce(largest, op=distributed.ReduceOp.MAX, group=group)
        distributed.all_reduce(values, group=group)
        values = values.where(~maxima, largest)
    broadcast_from_last_stage(values)
    return mean_metrics(dict(zip(names[0], values, strict=True)))


def broadcast_from_last_stage(values: Tensor) -> None:
    """Over the pipeline stages, in place."""
    if parallel_state.get_pipeline_model_parallel_world_size() > 1:
        distributed.broadcast(
            values,
            src=parallel_state.get_pipeline_model_parallel_last_rank(),
            group=parallel_state.get_pipeline_model_parallel_group(),
        )
