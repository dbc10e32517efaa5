"""Logits of a Megatron model under any layout, dense or packed, through the pipeline schedule that training uses."""

from typing import Any

import torch
from torch import Tensor


def pack(sequences: list[Tensor], multiple: int) -> tuple[Tensor, Any, list[int]]:
    """Return all sequences in one row, each padded to a multiple, and the start of each."""
    from megatron.core.packed_seq_params import PackedSeqParams

    lengths = torch.tensor([len(sequence) for sequence in sequences])
    slots = (lengths + multiple - 1) // multiple * multiple
    ends, slot_ends = (torch.nn.functional.pad(sizes.cumsum(0), (1, 0)).int() for sizes in (lengths, slots))
    row = torch.zeros(1, int(slot_ends[-1]), dtype=torch.int64)
    starts = slot_ends[:-1].tolist()
    for start, sequence in zip(starts, sequences, strict=True):
        row[0, start : start + len(sequence)] = sequence
    longest = int(slots.max())
    packing = PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=ends,
        cu_seqlens_kv=ends,
        cu_seqlens_q_padded=slot_ends,
        cu_seqlens_kv_padded=slot_ends,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
    )
    return row, packing, starts


def run_forward(model: list[torch.nn.Module], tokens: Tensor, vocab_size: int, packing: Any = None) -> Tensor | None:
    """Return logits [batch, sequence, vocabulary] without padding on the last pipeline stage, None on the others."""
    from megatron.core import parallel_state
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

    def step(iterator: Any, chunk: torch.nn.Module) -> tuple[Tensor, Any]:
        positions = torch.arange(tokens.shape[1]).expand_as(tokens)
        logits = chunk(tokens, positions, None, packed_seq_params=packing)

        def collect(output: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            return output.sum(), {"logits": gather_from_tensor_model_parallel_region(output)[..., :vocab_size]}

        return logits, collect

    with torch.no_grad():
        results = get_forward_backward_func()(
            forward_step_func=step,
            data_iterator=[iter([])],
            model=model,
            num_microbatches=1,
            seq_length=tokens.shape[1],
            micro_batch_size=tokens.shape[0],
            forward_only=True,
        )
    return results[0]["logits"] if parallel_state.is_pipeline_last_stage() else None
