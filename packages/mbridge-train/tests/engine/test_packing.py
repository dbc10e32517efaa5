import random
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mbridge_train.engine.batch import Sample
from mbridge_train.engine.collate import ModelInputs, collate
from mbridge_train.engine.micro_batches import Plan, padding_share, plan_micro_batches
from mbridge_train.errors import TrainError


def token_imbalance(plan: Plan, lengths: Sequence[int]) -> float:
    """Tokens of the busiest data-parallel rank over the mean of all ranks: 1.0 is even, ``len(plan)`` is the worst."""
    totals = [sum(lengths[index] for micro_batch in rank for index in micro_batch) for rank in plan]
    return max(totals) * len(totals) / sum(totals)


def make_sample(length: int, seed: int = 0, reinforcement: bool = True) -> Sample:
    generator = torch.Generator().manual_seed(seed)
    weights = torch.rand(length, generator=generator)
    weights[0] = 0
    names = ("advantages", "old_logprobs", "reference_logprobs") if reinforcement else ()
    fields = {name: torch.randn(length, generator=generator) for name in names}
    return Sample(
        tokens=torch.randint(1, 100, (length,), generator=generator),
        weights=weights,
        fields=fields,
    )


@settings(max_examples=150, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 64), min_size=1, max_size=40),
    ranks=st.integers(1, 5),
    micro_batch_size=st.one_of(st.none(), st.integers(1, 7)),
    multiple=st.sampled_from([1, 4, 8]),
)
def test_plan_uses_every_sample_once_within_limits(
    lengths: list[int], ranks: int, micro_batch_size: int | None, multiple: int
) -> None:
    budget = None if micro_batch_size else 72
    plan = plan_micro_batches(
        lengths, ranks, micro_batch_size=micro_batch_size, token_budget=budget, pad_each_to_multiple=multiple
    )
    assert len(plan) == ranks
    assert len({len(rank) for rank in plan}) == 1
    micro_batches = [micro_batch for rank in plan for micro_batch in rank]
    assert sorted(index for micro_batch in micro_batches for index in micro_batch) == list(range(len(lengths)))
    for micro_batch in micro_batches:
        if micro_batch_size:
            assert len(micro_batch) <= micro_batch_size
        else:
            assert sum(-(-lengths[index] // multiple) * multiple for index in micro_batch) <= 72
    # No rank does more than the mean and one longest sample (Graham's bound).
    if micro_batch_size is None and multiple == 1:
        assert token_imbalance(plan, lengths) <= 1 + ranks * max(lengths) / sum(lengths)
    if micro_batch_size:
        assert len(plan[0]) == -(-len(lengths) // (ranks * micro_batch_size))


def test_plan_by_hand() -> None:
    # 9 | 8 1 are even; the shorter two share a micro-batch with the budget of 9.
    assert plan_micro_batches([1, 9, 8], 2, token_budget=9) == [[[1]], [[0, 2]]]
    # One sample for two ranks: the second one gets an empty micro-batch.
    assert plan_micro_batches([5], 2, micro_batch_size=4) == [[[0]], [[]]]
    # Equal lengths are dealt out in order.
    assert plan_micro_batches([3, 3, 3, 3], 2, micro_batch_size=1) == [[[0], [2]], [[1], [3]]]
    # LPT into two bins would give 8 + 4 and 7 + 5 + 4, over the budget; first fit keeps to it with three.
    assert len(plan_micro_batches([8, 7, 5, 4, 4], 1, token_budget=12)[0]) == 3


def test_plan_balances_long_tailed_lengths() -> None:
    generator = random.Random(3)
    lengths = [min(4096, int(generator.lognormvariate(6, 1)) + 1) for _ in range(256)]
    for limits in ({"micro_batch_size": 4}, {"token_budget": 8192}):
        balanced = token_imbalance(plan_micro_batches(lengths, 8, **limits), lengths)
        in_order = token_imbalance([[list(range(rank, 256, 8))] for rank in range(8)], lengths)
        assert balanced < 1.02 < 1.1 < in_order


def test_plan_needs_few_micro_batches_and_evens_them_out() -> None:
    plan = plan_micro_batches([4] * 12, 1, token_budget=20)
    assert [len(micro_batch) for micro_batch in plan[0]] == [4, 4, 4]


def test_plan_errors() -> None:
    with pytest.raises(TrainError, match=r"sample 1 has 9 tokens \(12 with padding\).*budget of 10"):
        plan_micro_batches([1, 9, 2], 2, token_budget=10, pad_each_to_multiple=4)
    with pytest.raises(TrainError, match="no samples"):
        plan_micro_batches([], 2, micro_batch_size=1)
    with pytest.raises(ValueError, match="exactly one"):
        plan_micro_batches([1], 1)
    with pytest.raises(ValueError, match="exactly one"):
        plan_micro_batches([1], 1, micro_batch_size=1, token_budget=1)
    with pytest.raises(ValueError, match="at least 1"):
        plan_micro_batches([1, 0], 1, micro_batch_size=1)


def by_hand() -> list[Sample]:
    first = Sample(tokens=torch.tensor([11, 12, 13]), weights=torch.tensor([0, 0.5, 0.25]))
    second = Sample(tokens=torch.tensor([21]), weights=torch.tensor([0.0]))
    third = Sample(tokens=torch.tensor([31, 32]), weights=torch.tensor([0, 1.0]))
    return [first, second, third]


def test_dense_by_hand() -> None:
    inputs = collate(by_hand(), packed=False, pad_to_multiple=4)
    assert inputs.tokens.tolist() == [[11, 12, 13, 0], [21, 0, 0, 0], [31, 32, 0, 0]]
    assert inputs.position_ids.tolist() == [[0, 1, 2, 3]] * 3
    assert inputs.targets.tolist() == [[12, 13, 0, 0], [0, 0, 0, 0], [32, 0, 0, 0]]
    assert inputs.weights.tolist() == [[0.5, 0.25, 0, 0], [0, 0, 0, 0], [1, 0, 0, 0]]
    assert inputs.fields == {}
    assert (inputs.cu_seqlens, inputs.cu_seqlens_padded, inputs.max_seqlen) == (None,) * 3
    assert [t.tolist() for t in inputs.unpack(inputs.targets.flatten())] == [[0, 12, 13], [0], [0, 32]]


def test_packed_by_hand() -> None:
    inputs = collate(by_hand(), packed=True, pad_to_multiple=2)
    assert inputs.tokens.tolist() == [[11, 12, 13, 0, 21, 0, 31, 32]]
    assert inputs.position_ids.tolist() == [[0, 1, 2, 3, 0, 1, 0, 1]]
    assert inputs.targets.tolist() == [[12, 13, 0, 0, 0, 0, 32, 0]]
    assert inputs.weights.tolist() == [[0.5, 0.25, 0, 0, 0, 0, 1, 0]]
    assert inputs.cu_seqlens is not None
    assert inputs.cu_seqlens_padded is not None
    assert inputs.cu_seqlens.tolist() == [0, 3, 4, 6]
    assert inputs.cu_seqlens_padded.tolist() == [0, 4, 6, 8]
    assert inputs.cu_seqlens.dtype == inputs.cu_seqlens_padded.dtype == torch.int32
    assert inputs.max_seqlen == 4
    assert [t.tolist() for t in inputs.unpack(inputs.targets.flatten())] == [[0, 12, 13], [0], [0, 32]]


@pytest.mark.parametrize(
    ("inputs", "shape"),
    [
        (collate([], packed=False, pad_to_multiple=4, field_names=["advantages"]), (1, 4)),
        (collate([], packed=True, pad_to_multiple=4, field_names=["advantages"]), (1, 4)),
    ],
)
def test_empty_micro_batch_is_padding_without_weight(inputs: ModelInputs, shape: tuple[int, int]) -> None:
    assert inputs.tokens.shape == inputs.targets.shape == inputs.position_ids.shape == inputs.weights.shape == shape
    assert not inputs.weights.any()
    assert inputs.unpack(inputs.weights.flatten()) == []
    assert inputs.fields["advantages"].shape == shape
    if inputs.cu_seqlens_padded is not None:
        assert inputs.cu_seqlens_padded.tolist() == [0, shape[1]]
        assert inputs.max_seqlen == shape[1]


@settings(max_examples=60, deadline=None)
@given(lengths=st.lists(st.integers(1, 17), min_size=1, max_size=9), multiple=st.sampled_from([1, 4, 6]))
def test_unpack_inverts_both_layouts(lengths: list[int], multiple: int) -> None:
    samples = [make_sample(length, seed) for seed, length in enumerate(lengths)]
    for packed in (False, True):
        inputs = collate(samples, packed=packed, pad_to_multiple=multiple)
        assert sorted(inputs.fields) == ["advantages", "old_logprobs", "reference_logprobs"]
        for name, values in {"weights": inputs.weights, **inputs.fields}.items():
            for sample, unpacked in zip(samples, inputs.unpack(values.flatten()), strict=True):
                assert unpacked[0] == 0
                expected = sample.weights if name == "weights" else sample.fields[name]
                assert torch.equal(unpacked[1:], expected[1:])
        # Every weight is somewhere, and in one place only.
        assert inputs.weights.count_nonzero() == sum(int(sample.weights.count_nonzero()) for sample in samples)
        # What stands at a position is what the token there and those before it predict.
        flat = inputs.tokens.flatten()
        for sample, start in zip(samples, inputs.sample_starts, strict=True):
            assert torch.equal(flat[start : start + sample.length], sample.tokens)
            assert torch.equal(inputs.targets.flatten()[start : start + sample.length - 1], sample.tokens[1:])


def test_collate_errors() -> None:
    with pytest.raises(ValueError, match="sample 1 of the batch has no field 'advantages', which sample 0 has"):
        collate([make_sample(3), make_sample(3, reinforcement=False)], packed=False)
    with pytest.raises(ValueError, match=r"\[9\] values for \[2, 4\] positions"):
        collate([make_sample(4), make_sample(2)], packed=False).unpack(torch.zeros(9))


def test_to_moves_every_tensor() -> None:
    moved = collate([make_sample(3)], packed=True).to("meta")
    tensors = (moved.tokens, moved.targets, moved.fields["advantages"], moved.cu_seqlens)
    assert {tensor.device.type for tensor in tensors if tensor is not None} == {"meta"}
    assert moved.max_seqlen == 3


@pytest.mark.parametrize(
    ("packed", "multiple", "expected"),
    [
        (False, 1, 1 - 15 / (2 * 7 + 3 * 2)),
        (True, 1, 0.0),
        (True, 4, 1 - 15 / (8 + 4 + 4 + 4)),
        (False, 4, 1 - 15 / (2 * 8 + 2 * 4)),
    ],
)
def test_padding_share(packed: bool, multiple: int, expected: float) -> None:
    lengths = [7, 3, 3, 2]
    plan = [[[0, 1], [2, 3]], [[], []]]
    share = padding_share(plan, lengths, packed=packed, pad_each_to_multiple=multiple)
    assert share == pytest.approx(expected)
    samples = [make_sample(length) for length in lengths]
    micro_batches = [[samples[index] for index in chosen] for chosen in plan[0]]
    collated = [collate(chosen, packed=packed, pad_to_multiple=multiple) for chosen in micro_batches]
    places = sum(inputs.tokens.numel() for inputs in collated)
    assert share == pytest.approx(1 - 15 / places), "the layouts themselves say the same"
