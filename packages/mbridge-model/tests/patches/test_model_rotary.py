"""Rotation of packed sequences, against Megatron-Core's loop over them."""

import pytest
import torch
from mbridge_model import enable_cpu

enable_cpu()

from mbridge_model.bridge.bridge import import_bridge  # noqa: E402
from mbridge_model.kernels import self_attention  # noqa: E402
from mbridge_model.patches import rotary  # noqa: E402
from megatron.core.models.common.embeddings import rope_utils  # noqa: E402
from torch import Tensor, distributed  # noqa: E402


@pytest.fixture
def group() -> distributed.ProcessGroup:
    class One:
        size = staticmethod(lambda: 1)
        rank = staticmethod(lambda: 0)

    return One()  # type: ignore[return-value]


def packed(lengths: list[int], *, freqs_of_each_token: bool) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(len(lengths))
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    tokens = torch.randn(sum(lengths), 3, 8, generator=generator)
    positions = sum(lengths) if freqs_of_each_token else max(lengths) + 2
    # Four of eight channels are rotated.
    return tokens, cu_seqlens, torch.randn(positions, 1, 1, 4, generator=generator)


@pytest.mark.parametrize("freqs_of_each_token", [False, True])
@pytest.mark.parametrize("lengths", [[5, 1, 7, 1], [1], [4]])
def test_as_one_by_one(lengths: list[int], freqs_of_each_token: bool, group: distributed.ProcessGroup) -> None:
    tokens, cu_seqlens, freqs = packed(lengths, freqs_of_each_token=freqs_of_each_token)
    expected = rotary._rotate_packed_with_context_parallelism(tokens, cu_seqlens, freqs, cp_group=group)
    assert torch.equal(rotary.rotate_packed(tokens, cu_seqlens, freqs, cp_group=group), expected)


def test_layers_share_the_angles_of_a_batch(group: distributed.ProcessGroup) -> None:
    tokens, cu_seqlens, freqs = packed([5, 3], freqs_of_each_token=False)
    first = rotary.rotate_packed(tokens, cu_seqlens, freqs, cp_group=group)
    (_, gathered) = self_attention._of_each_token[cu_seqlens]
    assert torch.equal(rotary.rotate_packed(tokens, cu_seqlens, freqs, cp_group=group), first)
    assert self_attention._of_each_token[cu_seqlens][1] is gathered
    others = freqs + 1  # another model's
    expected = rotary._rotate_packed_with_context_parallelism(tokens, cu_seqlens, others, cp_group=group)
    assert torch.equal(rotary.rotate_packed(tokens, cu_seqlens, others, cp_group=group), expected)
    count = len(self_attention._of_each_token)
    del cu_seqlens
    assert len(self_attention._of_each_token) == count - 1, "the angles go with the batch"


def test_a_loose_bound_of_lengths_is_no_angle_for_each_token() -> None:
    freqs = torch.arange(8.0).view(8, 1, 1, 1)  # as many positions as tokens
    gathered = self_attention.gathered_angles(torch.tensor([0, 3, 8], dtype=torch.int32), freqs, 8)
    assert gathered.flatten().tolist() == [0, 1, 2, 0, 1, 2, 3, 4]


def test_positions_with_an_empty_sequence() -> None:
    cu_seqlens = torch.tensor([0, 3, 3, 5], dtype=torch.int32)
    assert self_attention.packed_positions(cu_seqlens, 5).tolist() == [0, 1, 2, 0, 1]


def test_all_of_megatron_takes_them() -> None:
    import_bridge()
    from megatron.bridge.models.qwen_vl.modelling_qwen3_vl import rope

    assert rope_utils._apply_rotary_pos_emb_thd is rotary.rotate_packed
    assert rope._apply_rotary_pos_emb_bshd is rope_utils._apply_rotary_pos_emb_bshd is rotary._rotate
