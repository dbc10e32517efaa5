"""Heads: functions of the model's last hidden states or logits that return values at each position."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from mbridge_model.forward_pass import LastStage
from torch import Tensor

from mbridge_train.engine.collate import ModelInputs
from mbridge_train.layout import RankLayout
from mbridge_train.losses.logprob import vocab_parallel_logprob_and_entropy


@dataclass(frozen=True, slots=True)
class HeadInputs:
    """The inputs of a head, on the last pipeline stage."""

    micro_batch: ModelInputs
    last_stage: LastStage
    """Hidden states and logits in Megatron-Core's order, [sequence, batch, ...]."""
    layout: RankLayout
    """The vocabulary is split over its `tensor` axis."""
    vocab_size: int
    """True size of the vocabulary; columns after it are padding."""

    def hidden_states(self) -> Tensor:
        """Return the output of the final norm, [batch * sequence, hidden] in the model's dtype.

        Every tensor-parallel rank has all of it, and all must compute the same loss from it.
        """
        return self.last_stage.hidden_states().transpose(0, 1).flatten(0, 1)


Head = Callable[[HeadInputs], Mapping[str, Tensor]]
"""Returns float [batch * sequence, ...] tensors by name: at each position, a value of the token that follows.

Add the parameters of a head to the last stage's model chunk before you make the engine, so that gradient buffers,
optimizer and checkpoints include them. Parameters that are not tensor-parallel must have the same initial values on all
ranks. With `overlap_grad_reduce` every trained parameter of the chunk needs a gradient, so freeze an untied output
layer if the head does not read the logits.
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class LogprobHead:
    """Head that returns `logprobs`, the natural log probability of each next token, and optionally `entropy`, in nats.

    `temperature` divides the logits.
    """

    temperature: float = 1.0
    with_entropy: bool = False

    def __call__(self, inputs: HeadInputs) -> Mapping[str, Tensor]:
        logits = inputs.last_stage.logits()  # their gradient overwrites them
        length, batch, columns = logits.shape
        logprobs, entropy = vocab_parallel_logprob_and_entropy(
            logits.flatten(0, 1),
            inputs.micro_batch.targets.t().reshape(-1),
            group=inputs.layout.tensor.group,
            vocab_start=inputs.layout.tensor.rank * columns,
            vocab_size=inputs.vocab_size,
            temperature=self.temperature,
            with_entropy=self.with_entropy,
            overwrite=True,
        )
        values = {"logprobs": logprobs} | ({} if entropy is None else {"entropy": entropy})
        return {name: value.view(length, batch).t().reshape(-1) for name, value in values.items()}
