"""Core attention of the torch backend against a softmax written out in fp64."""

from typing import Any

import pytest
import torch
from mbridge_model.patches.cpu import enable_cpu
from torch import Tensor

from testing.gang import Gang, WorkerPool

HEADS, GROUPS, CHANNELS = 6, 2, 8


def naive(query: Tensor, key: Tensor, value: Tensor, *, window: int | None = None) -> Tensor:
    """Causal attention of one sequence, [tokens, heads, channels], one query and head at a time."""
    output = torch.zeros_like(query, dtype=torch.float64)
    for head in range(query.shape[1]):
        group = head * key.shape[1] // query.shape[1]
        for position in range(len(query)):
            first = 0 if window is None else max(0, position - window)
            scores = key[first : position + 1, group].double() @ query[position, head].double() / CHANNELS**0.5
            output[position, head] = scores.softmax(0) @ value[first : position + 1, group].double()
    return output


def make_attention(**settings: Any) -> Any:
    enable_cpu()
    from mbridge_model.torch_backend.attention import TorchDotProductAttention
    from megatron.core.transformer.enums import AttnMaskType
    from megatron.core.transformer.transformer_config import TransformerConfig

    config = TransformerConfig(
        num_layers=2, hidden_size=48, num_attention_heads=HEADS, kv_channels=CHANNELS, attention_dropout=0.0, **settings
    )
    return TorchDotProductAttention(config, 1, AttnMaskType.causal, "self")


def make_inputs(*shape: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    heads = (HEADS, GROUPS, GROUPS)
    query, key, value = (torch.randn(*shape, count, CHANNELS, generator=generator) for count in heads)
    return query, key, value


def dense_error(window: int | None) -> float:
    """Runs in a worker."""
    settings = {} if window is None else {"window_size": (window, 0)}
    query, key, value = make_inputs(7, 3)
    output = make_attention(**settings)(query, key, value, None).unflatten(-1, (HEADS, CHANNELS))
    expected = torch.stack([naive(query[:, row], key[:, row], value[:, row], window=window) for row in range(3)], dim=1)
    return float((output - expected).abs().max())


def masked_error() -> float:
    """Runs in a worker. The first two keys of each row are forbidden, as left padding is."""
    query, key, value = make_inputs(7, 1)
    mask = torch.zeros(1, 1, 7, 7, dtype=torch.bool)
    mask[..., :2] = True
    output = make_attention()(query, key, value, mask).unflatten(-1, (HEADS, CHANNELS))[2:, 0]
    return float((output - naive(query[2:, 0], key[2:, 0], value[2:, 0])).abs().max())


def packed_errors(lengths: list[int], slots: list[int], window: int | None) -> tuple[float, float]:
    """Runs in a worker. The largest error at tokens, and the largest output at padding."""
    from megatron.core.packed_seq_params import PackedSeqParams

    attention = make_attention(**({} if window is None else {"window_size": (window, 0)}))
    query, key, value = make_inputs(sum(slots))
    ends, slot_ends = (torch.tensor([0, *sizes]).cumsum(0).int() for sizes in (lengths, slots))
    packing = PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=ends,
        cu_seqlens_kv=ends,
        cu_seqlens_q_padded=slot_ends,
        cu_seqlens_kv_padded=slot_ends,
        max_seqlen_q=max(slots),
        max_seqlen_kv=max(slots),
    )
    output = attention(query, key, value, None, packed_seq_params=packing).unflatten(-1, (HEADS, CHANNELS))
    error, padding = 0.0, 0.0
    for start, length, slot in zip(slot_ends.tolist(), lengths, slots, strict=False):
        end = start + length
        if length:
            expected = naive(query[start:end], key[start:end], value[start:end], window=window)
            error = max(error, float((output[start:end] - expected).abs().max()))
        if slot > length:
            padding = max(padding, float(output[end : start + slot].abs().max()))
    return error, padding


def dropout_scale() -> tuple[float, bool, bool]:
    """Runs in a worker. Attention to equal values returns them; dropout scatters around them, only in training."""
    enable_cpu()
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    parallel_state.initialize_model_parallel()
    try:
        model_parallel_cuda_manual_seed(3)
        attention = make_attention()
        attention.dropout = 0.25
        query, key, value = make_inputs(64, 4)
        value = torch.ones_like(value)
        first, second = attention(query, key, value, None), attention(query, key, value, None)
        model_parallel_cuda_manual_seed(3)
        again = attention(query, key, value, None)
        attention.eval()
        exact = torch.allclose(attention(query, key, value, None), torch.ones_like(first))
        assert not torch.equal(first, second)
        return float(first.mean()), bool(torch.equal(first, again)), exact
    finally:
        parallel_state.destroy_model_parallel()


@pytest.fixture
def worker(worker_pool: WorkerPool) -> Gang:
    return Gang(1, worker_pool)


@pytest.mark.parametrize("window", [None, 0, 2, 100])
def test_dense(worker: Gang, window: int | None) -> None:
    assert worker.run(dense_error, window)[0] < 1e-6


def test_mask_adds_to_the_causal_mask(worker: Gang) -> None:
    assert worker.run(masked_error)[0] < 1e-6


@pytest.mark.parametrize("window", [None, 2])
@pytest.mark.parametrize(
    ("lengths", "slots"),
    [
        ([5], [5]),
        ([1], [1]),
        ([1, 1, 9, 3, 4, 0, 8], [1, 1, 9, 3, 4, 0, 8]),
        ([1, 5, 3, 0, 16, 17], [2, 6, 4, 2, 16, 18]),
    ],
)
def test_packed(worker: Gang, lengths: list[int], slots: list[int], window: int | None) -> None:
    error, padding = worker.run(packed_errors, lengths, slots, window)[0]
    assert error < 1e-6
    assert padding == 0.0


def test_dropout(worker: Gang) -> None:
    mean, repeats, exact = worker.run(dropout_scale)[0]
    assert mean == pytest.approx(1.0, abs=0.02)
    assert repeats
    assert exact


def bucket_lengths(lengths: list[int]) -> list[list[int]]:
    """Runs in a worker."""
    enable_cpu()
    from mbridge_model.torch_backend.attention import _length_buckets

    return [[lengths[index] for index in bucket] for bucket in _length_buckets(lengths)]


def test_buckets_waste_less_than_half(worker: Gang) -> None:
    lengths = [1, 2, 3, 4, 5, 8, 9, 16, 17, 0, 3, 1000]
    buckets = worker.run(bucket_lengths, lengths)[0]
    assert sorted(length for bucket in buckets for length in bucket) == sorted(filter(None, lengths))
    assert all(2 * min(bucket) > max(bucket) for bucket in buckets)
    assert len(buckets) == 7


def refusals() -> list[str]:
    """Runs in a worker."""
    messages = []
    for settings in ({"softmax_type": "learnable"}, {"context_parallel_size": 2}):
        try:
            make_attention(**settings)
        except ValueError as error:
            messages.append(str(error))
    return messages


def test_what_is_not_built_is_refused(worker: Gang) -> None:
    assert worker.run(refusals)[0] == [
        "softmax_type 'learnable' is not built in the torch backend",
        "context_parallel_size > 1 is not built in the torch backend; use backend 'te' on a GPU",
    ]


@pytest.mark.parametrize(("length", "pays"), [(4096, True), (8192, True), (4224, True), (2048, False), (5000, False)])
def test_cudnn_is_for_long_sequences_of_few_lengths(length: int, pays: bool) -> None:
    from mbridge_model.torch_backend.attention import cudnn_pays

    assert cudnn_pays(length) == pays
