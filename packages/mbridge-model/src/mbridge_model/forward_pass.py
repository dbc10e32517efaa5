"""Run a model chunk, and apply a function to its logits."""

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn

from mbridge_model.vision import VisionInputs

# Maps logits [sequence, batch, padded vocabulary / TP] in the model's dtype to anything.
Head = Callable[[Tensor], Any]


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
        head: what to make of the logits, which it gets in Megatron-Core's order, without the copy of so large a tensor
            into the other one.

    Returns:
        On the last pipeline stage what `head` returns, without one logits [batch, sequence, padded vocabulary / TP] in
        the model's dtype; on the others what the schedule sends on.

    Raises:
        ModelError: the placeholders in `tokens` are not as many as the features of `vision`.
    """
    arguments: dict[str, Any] = {} if vision is None else {"vision": vision}
    if getattr(model, "config").params_dtype.itemsize == 2:  # noqa: B009 - the class declares no such attribute
        # The half-precision wrapper would copy the logits to fp32; a loss reads them so piece by piece.
        arguments["fp32_output"] = False
    if head is not None:
        arguments["output_processor"] = partial(_apply_head, head)
    return model(tokens, position_ids, attention_mask=None, packed_seq_params=packed_seq_params, **arguments)


def _apply_head(
    head: Head,
    *,
    hidden_states: Tensor,
    output_layer: nn.Module,
    output_weight: Tensor | None,
    scale_logits: Callable[[Tensor], Tensor],
    **_: Any,
) -> Any:
    """Megatron-Core's `output_processor`."""
    logits, _bias = output_layer(hidden_states, weight=output_weight)
    return head(scale_logits(logits))
