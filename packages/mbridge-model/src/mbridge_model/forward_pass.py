"""Run a model chunk, and apply a head to what its last layer gives."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn

from mbridge_model.vision import VisionInputs


@dataclass(frozen=True, slots=True)
class LastStage:
    """The last pipeline stage as a head sees it; hidden states and logits are computed when it asks for them."""

    _hidden_states: Tensor
    _logits: Callable[[Tensor], Tensor]
    _is_split: bool

    def hidden_states(self) -> Tensor:
        """Return the output of the final norm, [sequence, batch, hidden], whole on every tensor-parallel rank.

        All ranks must compute equal gradients for it: under sequence parallelism each takes its part of its own.
        """
        if not self._is_split:
            return self._hidden_states
        from megatron.core.tensor_parallel import gather_from_sequence_parallel_region

        whole: Tensor = gather_from_sequence_parallel_region(self._hidden_states, tensor_parallel_output_grad=False)
        return whole

    def logits(self) -> Tensor:
        """Return the logits, [sequence, batch, padded vocabulary / TP] in the model's dtype."""
        return self._logits(self._hidden_states)


Head = Callable[[LastStage], Any]


def forward(
    model: nn.Module,
    *,
    tokens: Tensor,
    position_ids: Tensor,
    packed_seq_params: Any = None,
    vision: VisionInputs | None = None,
    head: Head | None = None,
) -> Any:
    """Run one model chunk on one micro-batch, as a pipeline schedule's forward step does.

    Args:
        model: a chunk that `load` returned, bare or wrapped (data parallel, half precision).
        tokens: int64 [batch, sequence]; [1, total] for a packed batch.
        position_ids: int64 [batch, sequence], counted within each sequence; for a vision-language model
            [3, batch, sequence] from `mrope_position_ids` (positions of padding do not matter). On every stage.
        packed_seq_params: Megatron-Core's `PackedSeqParams` of a packed batch. On every stage.
        vision: the images and videos whose placeholders are in `tokens`. Only the first stage reads them, so the
            others may pass None.
        head: maps what the last stage computes to anything. It gets tensors in Megatron-Core's order, which avoids
            a copy of the logits into another one.

    Returns:
        On the last pipeline stage the result of `head`, or without one the logits [batch, sequence, padded vocabulary /
        TP] in the model's dtype; on the others the tensor that the schedule sends on.

    Raises:
        ModelError: the number of placeholders in `tokens` differs from the number of features of `vision`.
    """
    arguments: dict[str, Any] = {} if vision is None else {"vision": vision}
    if getattr(model, "config").params_dtype.itemsize == 2:  # noqa: B009 - the class declares no such attribute
        # The half-precision wrapper would copy the logits to fp32; a loss converts them piece by piece.
        arguments["fp32_output"] = False
    if head is not None:
        split: bool = getattr(model, "config").sequence_parallel  # noqa: B009 - likewise
        arguments["output_processor"] = partial(_apply_head, head, split)
    return model(tokens, position_ids, attention_mask=None, packed_seq_params=packed_seq_params, **arguments)


def _apply_head(
    head: Head,
    is_split: bool,
    *,
    hidden_states: Tensor,
    output_layer: nn.Module,
    output_weight: Tensor | None,
    scale_logits: Callable[[Tensor], Tensor],
    **_: Any,
) -> Any:
    """Apply `head`; an `output_processor` of Megatron-Core."""

    def logits(hidden: Tensor) -> Tensor:
        return scale_logits(output_layer(hidden, weight=output_weight)[0])

    return head(LastStage(hidden_states, logits, is_split))
