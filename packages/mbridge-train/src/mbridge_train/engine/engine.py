"""The training engine: forward and backward passes over a global batch, and the optimizer step.

Every pass takes a *global batch*, the same list of samples on every rank. The engine assigns the samples to
data-parallel ranks and micro-batches, runs Megatron-Core's pipeline schedule, and returns results for the whole batch
on every rank. Because the loss is a weighted sum over the global batch (see `batch`), its value and the gradient are
the same under every layout, micro-batching and packing.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from mbridge_model import ModelHandle, export, forward
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.utils import get_model_config
from torch import Tensor, nn
from torch.profiler import record_function

from mbridge_train.engine.agreement import check_agreement
from mbridge_train.engine.batch import Sample, common_fields
from mbridge_train.engine.collate import ModelInputs, collate
from mbridge_train.engine.micro_batches import Plan, padding_share, plan_micro_batches
from mbridge_train.engine.output_heads import Head, HeadInputs, LogprobHead
from mbridge_train.engine.results import gather_samples, reduce_metrics
from mbridge_train.errors import TrainError
from mbridge_train.layout import RankLayout
from mbridge_train.losses.base import LossInputs, LossOutputs
from mbridge_train.memory.offload import KEPT, PARTS, KeptPart, Offload, Part
from mbridge_train.optim.optimizer import Optimizer, OptimizerSettings, StepResult, wrap_data_parallel

PLANNED_LENGTHS = 128
"""Multiple to which rows are padded for Transformer Engine: cuDNN plans its attention anew for each new length, which
takes a sixth of a second."""

LossFunction = Callable[[LossInputs], LossOutputs]
"""Maps the tokens of one micro-batch to a weighted sum and metrics (see `losses.base`)."""

# Maps a micro-batch and the outputs of its head to a loss, a number of tokens and results, for the schedule.
_Finish = Callable[[ModelInputs, Mapping[str, Tensor]], tuple[Tensor, Tensor, dict[str, Any]]]


@dataclass(frozen=True, kw_only=True, slots=True)
class MicroBatching:
    """How a rank's share of the global batch is cut into micro-batches. Give exactly one of the two sizes.

    Attributes:
        micro_batch_size: number of samples in a micro-batch.
        token_budget: largest number of tokens in a micro-batch, whose samples are then packed end to end.
        packed: pack the samples of a fixed-size micro-batch, too, instead of padding them to the longest.
    """

    micro_batch_size: int | None = None
    token_budget: int | None = None
    packed: bool = False


class Engine:
    """A Megatron model and its optimizer.

    Args:
        model, handle: from `mbridge_model.load` with the override `calculate_per_token_loss`.
        micro_batching: for training and forward passes alike.
        optimizer: None makes an engine that only evaluates.

    Raises:
        TrainError: the model adds router losses.
    """

    def __init__(
        self,
        model: list[nn.Module],
        handle: ModelHandle,
        *,
        micro_batching: MicroBatching,
        optimizer: OptimizerSettings | None = None,
    ) -> None:
        self.handle = handle
        self.micro_batching = micro_batching
        self.device = next(model[0].parameters()).device
        self.config = get_model_config(model[0])
        self.layout = RankLayout.of_model(self.config, chunks=len(model))
        self.optimizer: Optimizer | None = None
        self.model: list[Any] = model
        if optimizer is not None:
            self.model = list(wrap_data_parallel(model, optimizer))
            self.optimizer = Optimizer(self.model, optimizer)
            self.config.grad_scale_func = self.optimizer.megatron.scale_loss
            self.config.finalize_model_grads_func = _finalize_summed_gradients
            if optimizer.overlap_grad_reduce:
                no_sync = [chunk.no_sync for chunk in self.model]
                self.config.no_sync_func = no_sync[0] if len(no_sync) == 1 else no_sync
        self.memory = Offload(self.model, self.optimizer, self.device)

    @property
    def chunks(self) -> list[nn.Module]:
        """The Megatron modules of this rank without their wrappers, one for each virtual pipeline stage, in order."""
        return [_unwrap(chunk) for chunk in self.model]

    @record_function("forward_backward")
    def forward_backward(
        self, batch: list[Sample], loss: LossFunction, *, head: Head | None = None
    ) -> Mapping[str, float]:
        """Fill the gradient buffers with the gradient of `loss` over the global batch. Collective over all ranks.

        Gradients of an earlier call are dropped. `step` applies the new ones.

        Args:
            batch: the global batch, the same on every rank.
            head: computes the outputs that `loss` reads from the last hidden states; None: `LogprobHead()`.

        Returns:
            On every rank, the metrics of the loss over the global batch, as `results.mean_metrics` returns them. Read
            them after `step`, because reading waits for the gradients on the GPU.

        Raises:
            TrainError: the engine has no optimizer; the batch is empty, or not the same on all ranks; a sample exceeds
                the token budget; the weights are offloaded.
            ValueError: a sample lacks a field that others have.
        """
        optimizer = self._trained_with()
        self.memory.require("weights")
        self.memory.onload("gradients")
        for chunk in self.model:
            chunk.zero_grad_buffer()
        optimizer.megatron.zero_grad()
        finish = partial(_loss_and_metrics, loss)
        _, per_micro_batch = self._run(batch, head or LogprobHead(), finish, forward_only=False)
        return reduce_metrics(per_micro_batch, self.layout, self.device)

    @record_function("optimizer_step")
    def step(self) -> StepResult:
        """Apply the gradients. Collective over all ranks."""
        optimizer = self._trained_with()
        self.memory.require(*PARTS)
        return optimizer.step()

    @record_function("forward")
    def forward(self, batch: list[Sample], head: Head) -> dict[str, list[Tensor]]:
        """Return the outputs of `head` for every sample. Collective over all ranks.

        Args:
            batch: the global batch, the same on every rank; weights are not used.

        Returns:
            On every rank, for each output of the head, one float32 CPU tensor [length, ...] per sample, in the order of
            the batch. Entry ``t`` is the value at the position that predicts token ``t``; entry 0 is 0.

        Raises:
            TrainError, ValueError: as in `forward_backward`.
        """
        plan, per_micro_batch = self._run(batch, head, _per_sample, forward_only=True)
        lengths = [sample.length for sample in batch]
        return gather_samples(per_micro_batch, plan[self.layout.data.rank], lengths, self.layout, self.device)

    def logprobs(self, batch: list[Sample], *, temperature: float = 1.0) -> list[Tensor]:
        """Return the log probability of each token given the tokens before it, in the form of `forward`'s results."""
        return self.forward(batch, LogprobHead(temperature=temperature))["logprobs"]

    def padding_share(self, batch: list[Sample]) -> float:
        """Return the share of padding among the positions that all ranks compute in a pass over `batch`."""
        lengths = [sample.length for sample in batch]
        plan, multiple = self._plan(lengths), self._length_multiple
        return padding_share(plan, lengths, packed=self._is_packed, pad_each_to_multiple=multiple)

    def reads_vision(self, lengths: list[int]) -> set[int]:
        """Return the indices of the samples whose images and videos this rank reads; only a first stage reads any.

        `lengths` are the numbers of tokens of the samples of the global batch.
        """
        if not self.layout.is_first_stage:
            return set()
        return {index for micro_batch in self._plan(lengths)[self.layout.data.rank] for index in micro_batch}

    def export_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the weights by HuggingFace name. Collective: every rank must iterate to the end."""
        self.synchronize_weights()
        return export(self.model, self.handle)

    def synchronize_weights(self) -> None:
        """Finish the parameter gather that would overlap with the next forward pass, before weights are read."""
        self.memory.require("weights")
        if self.optimizer is not None and self.optimizer.settings.overlap_param_gather:
            for chunk in self.model:
                chunk.start_param_sync(force_sync=True)

    def offload(self, *parts: Part) -> None:
        """Free the device memory of `parts` until `onload`, and of "gradients" until `forward_backward`.

        Tensors from `export_weights` may be views of the weights and must no longer be used. Other processes get the
        freed memory after `torch.cuda.empty_cache()`. Raises `TrainError` if there is not enough host memory.
        """
        if "weights" in parts and "weights" not in self.memory.away:
            self.synchronize_weights()
        for part in parts:
            self.memory.offload(part)

    def onload(self, *parts: KeptPart) -> None:
        """Bring `parts`, by default both, back bit for bit. Return before the copies have ended."""
        for part in parts or KEPT:
            self.memory.onload(part)

    @contextmanager
    def onloaded(self) -> Iterator[None]:
        """Keep weights and optimizer on the device within the block, then offload the parts that were offloaded."""
        away = self.memory.away
        self.onload()
        self.memory.require(*KEPT)
        try:
            yield
        finally:
            self.offload(*away)

    def close(self) -> None:
        """Make the engine unusable, so that its memory is freed with the last reference to it.

        Megatron-Core's gradient hooks hold the model in cycles through autograd's C++ nodes, which Python's garbage
        collector does not see: without `close`, a process keeps all its engines in memory.
        """
        for chunk in self.model:
            if isinstance(chunk, DistributedDataParallel):
                chunk.grad_accs.clear()
        self.config.grad_scale_func = self.config.finalize_model_grads_func = self.config.no_sync_func = None

    def _trained_with(self) -> Optimizer:
        if self.optimizer is None:
            raise TrainError("this engine was built without an optimizer and cannot train")
        return self.optimizer

    def _plan(self, lengths: list[int]) -> Plan:
        return plan_micro_batches(
            lengths,
            self.layout.data.size,
            micro_batch_size=self.micro_batching.micro_batch_size,
            token_budget=self.micro_batching.token_budget,
            pad_each_to_multiple=self._length_multiple,
        )

    @property
    def _is_packed(self) -> bool:
        return self.micro_batching.packed or self.micro_batching.token_budget is not None

    @property
    def _length_multiple(self) -> int:
        # Sequence parallelism divides the sequence evenly over the tensor-parallel ranks.
        ranks = self.layout.tensor.size if self.layout.sequence else 1
        planned = PLANNED_LENGTHS if self.handle.backend == "te" and not self._is_packed else 1
        return math.lcm(ranks, planned)

    def _run(
        self, batch: list[Sample], head: Head, finish: _Finish, *, forward_only: bool
    ) -> tuple[Plan, list[dict[str, Any]]]:
        """Run the pipeline schedule; return the plan, and on the last stage the results of `finish` by micro-batch."""
        self.memory.require("weights")
        check_agreement(batch, self.layout)
        plan = self._plan([sample.length for sample in batch])
        micro_batches = plan[self.layout.data.rank]
        for chunk in self.model:
            chunk.train(not forward_only)

        field_names = common_fields(batch)

        def collated() -> Iterator[ModelInputs]:
            """Collate micro-batches one at a time, when the schedule asks for them."""
            for micro_batch in micro_batches:
                yield collate(
                    [batch[index] for index in micro_batch],
                    packed=self._is_packed,
                    pad_to_multiple=self._length_multiple,
                    field_names=field_names,
                    with_vision=self.layout.is_first_stage,
                )

        def forward_step(iterator: Iterator[ModelInputs], model: nn.Module) -> tuple[Any, Callable[..., Any]]:
            inputs = next(iterator).to(self.device)
            output = forward(
                model,
                tokens=inputs.tokens,
                position_ids=inputs.position_ids,
                packed_seq_params=_packed_seq_params(inputs),
                vision=inputs.vision,
                head=lambda last_stage: head(HeadInputs(inputs, last_stage, self.layout, self.handle.vocab_size)),
            )
            return output, partial(finish, inputs)

        with torch.set_grad_enabled(not forward_only):
            results = get_forward_backward_func()(
                forward_step_func=forward_step,
                data_iterator=[collated() for _ in self.model],
                model=self.model,
                num_microbatches=len(micro_batches),
                # Stages exchange the real shapes (variable_seq_lengths), so these two are placeholders.
                seq_length=1,
                micro_batch_size=1,
                forward_only=forward_only,
            )
        return plan, results


def _unwrap(module: nn.Module) -> nn.Module:
    while isinstance(inner := getattr(module, "module", None), nn.Module):
        module = inner
    return module


def _loss_and_metrics(
    loss: LossFunction, inputs: ModelInputs, outputs: Mapping[str, Tensor]
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    weights = inputs.weights.reshape(-1)
    fields = {name: values.reshape(-1) for name, values in inputs.fields.items()}
    result = loss(LossInputs(weights=weights, outputs=outputs, fields=fields))
    # A clone, since the schedule divides the loss in place.
    metrics = {"loss": result.loss.detach().clone(), "weight": weights.sum()} | result.metrics
    return result.loss, _uncounted(weights.device), metrics


def _per_sample(inputs: ModelInputs, outputs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, dict[str, list[Tensor]]]:
    """Return a loss of 0 and, for each output, an empty tensor that gives its shape, then a tensor per sample."""
    device = inputs.weights.device
    results = {name: [values[:0], *inputs.unpack(values)] for name, values in outputs.items()}
    return torch.zeros((), device=device), _uncounted(device), results


def _uncounted(device: torch.device) -> Tensor:
    """Return 0, a placeholder for the number of tokens, which `_finalize_summed_gradients` ignores."""
    return torch.zeros((), dtype=torch.int, device=device)


def _finalize_summed_gradients(model: list[nn.Module], num_tokens: Tensor | None, **arguments: Any) -> None:
    """Reduce gradients over all groups without dividing by the number of tokens, which the loss weights include."""
    finalize_model_grads(model, None, **arguments)


def _packed_seq_params(inputs: ModelInputs) -> PackedSeqParams | None:
    if inputs.cu_seqlens is None:
        return None
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=inputs.cu_seqlens,
        cu_seqlens_kv=inputs.cu_seqlens,
        cu_seqlens_q_padded=inputs.cu_seqlens_padded,
        cu_seqlens_kv_padded=inputs.cu_seqlens_padded,
        max_seqlen_q=inputs.max_seqlen,
        max_seqlen_kv=inputs.max_seqlen,
    )
