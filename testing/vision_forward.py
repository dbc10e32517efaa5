"""Logits and gradients of a vision-language model under any layout, through the pipeline schedule."""

from typing import Any

import torch
from mbridge_model import MropeSettings, VisionInputs, forward, mrope_position_ids
from torch import Tensor, nn

from testing.megatron_forward import pack
from testing.vision_samples import SECONDS_PER_GRID

Batch = dict[str, Any]


def positions_of(sample: dict[str, Any], settings: MropeSettings) -> Tensor:
    seconds = [SECONDS_PER_GRID] * sum(sample["is_video"])
    return mrope_position_ids(sample["tokens"], sample["grid_thw"], settings, seconds_per_grid=seconds)


def vision_of(samples: list[dict[str, Any]]) -> VisionInputs | None:
    return VisionInputs.concatenate(
        [
            VisionInputs(pixel_values=sample["pixel_values"], grid_thw=sample["grid_thw"])
            for sample in samples
            if sample["grid_thw"] is not None
        ]
    )


def packed_batch(samples: list[dict[str, Any]], settings: MropeSettings, multiple: int) -> tuple[Batch, list[int]]:
    """Return all samples in one row, each padded to a multiple, and the start of each."""
    row, packing, starts = pack([sample["tokens"] for sample in samples], multiple)
    positions = torch.zeros(3, *row.shape, dtype=torch.int64)
    for start, sample in zip(starts, samples, strict=True):
        positions[:, 0, start : start + len(sample["tokens"])] = positions_of(sample, settings)
    batch = {"tokens": row, "position_ids": positions, "packed_seq_params": packing, "vision": vision_of(samples)}
    return batch, starts


def dense_batch(samples: list[dict[str, Any]], settings: MropeSettings, multiple: int) -> tuple[Batch, list[int]]:
    """Return one row per sample, padded to the longest, and the start of each in the flattened rows."""
    longest = max(len(sample["tokens"]) for sample in samples)
    width = (longest + multiple - 1) // multiple * multiple
    tokens = torch.zeros(len(samples), width, dtype=torch.int64)
    positions = torch.zeros(3, *tokens.shape, dtype=torch.int64)
    for row, sample in enumerate(samples):
        tokens[row, : len(sample["tokens"])] = sample["tokens"]
        positions[:, row, : len(sample["tokens"])] = positions_of(sample, settings)
    starts = [row * width for row in range(len(samples))]
    return {"tokens": tokens, "position_ids": positions, "vision": vision_of(samples)}, starts


def run(
    model: list[nn.Module], batch: Batch, starts: list[int], lengths: list[int], vocab_size: int, *, backward: bool
) -> list[Tensor] | None:
    """Return logits [length, vocabulary] of each sample on the last pipeline stage, None on the others.

    With `backward`, the gradient of the cross entropy summed over all samples is in the parameters' `main_grad`; the
    chunks must then be wrapped for data parallelism.
    """
    from megatron.core import parallel_state
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

    def step(iterator: Any, chunk: nn.Module) -> tuple[Tensor, Any]:
        is_first = parallel_state.is_pipeline_first_stage()
        # Only the first stage reads images.
        output = forward(chunk, **(batch if is_first else batch | {"vision": None}))

        def collect(output: Tensor) -> tuple[Tensor, dict[str, list[Tensor]]]:
            logits = gather_from_tensor_model_parallel_region(output)[..., :vocab_size].flatten(0, 1)
            tokens = batch["tokens"].flatten()
            pieces = [logits[start : start + length] for start, length in zip(starts, lengths, strict=True)]
            loss = torch.stack(
                [
                    torch.nn.functional.cross_entropy(piece[:-1], tokens[start + 1 : start + length], reduction="sum")
                    for piece, start, length in zip(pieces, starts, lengths, strict=True)
                ]
            ).sum()
            return loss, {"logits": [piece.detach() for piece in pieces]}

        return output, collect

    with torch.set_grad_enabled(backward):
        results = get_forward_backward_func()(
            forward_step_func=step,
            data_iterator=[iter([])],
            model=model,
            num_microbatches=1,
            seq_length=batch["tokens"].shape[1],
            micro_batch_size=batch["tokens"].shape[0],
            forward_only=not backward,
        )
    return results[0]["logits"] if parallel_state.is_pipeline_last_stage() else None


def gradients_into_weights(
    model: list[nn.Module], batch: Batch, starts: list[int], lengths: list[int], vocab_size: int
) -> None:
    """Replace each weight by its gradient, so that exporting the model gives gradients under HuggingFace names."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
    from megatron.core.utils import get_model_config

    config = get_model_config(model[0])
    config.finalize_model_grads_func = finalize_model_grads
    wrapped = [DistributedDataParallel(config, DistributedDataParallelConfig(), chunk.train()) for chunk in model]
    run(wrapped, batch, starts, lengths, vocab_size, backward=True)
    with torch.no_grad():
        for chunk in wrapped:
            for parameter in chunk.parameters():
                parameter.copy_(parameter.main_grad)
            chunk.grad_accs.clear()
