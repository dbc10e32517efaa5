from typing import Any

import pytest
import torch
from mbridge_train.engine.batch import Sample, aggregation_weights

MASKS = [torch.tensor([0, 1, 1, 1]), torch.tensor([False, False]), torch.tensor([0.0, 0.0, 1.0])]


def test_weights_of_each_mode_by_hand() -> None:
    # T = 4 tokens, N = 2 sequences that train something; the second one is empty and does not count.
    token_mean = aggregation_weights(MASKS, "token-mean")
    assert [w.tolist() for w in token_mean] == [[0, 0.25, 0.25, 0.25], [0, 0], [0, 0, 0.25]]
    token_sum = aggregation_weights(MASKS, "seq-mean-token-sum")
    assert [w.tolist() for w in token_sum] == [[0, 0.5, 0.5, 0.5], [0, 0], [0, 0, 0.5]]
    sequence_mean = aggregation_weights(MASKS, "seq-mean-token-mean")
    torch.testing.assert_close(sequence_mean[0], torch.tensor([0, 1 / 6, 1 / 6, 1 / 6]))
    assert [w.tolist() for w in sequence_mean[1:]] == [[0, 0], [0, 0, 0.5]]
    assert all(w.dtype == torch.float32 for w in token_mean + token_sum + sequence_mean)


@pytest.mark.parametrize("mode", ["token-mean", "seq-mean-token-sum", "seq-mean-token-mean"])
def test_weights_equal_the_aggregate_over_a_padded_matrix(mode: str) -> None:
    generator = torch.Generator().manual_seed(1)
    losses = torch.randn(7, 13, generator=generator, dtype=torch.float64)
    mask = torch.rand(7, 13, generator=generator) < 0.4
    mask[:, 0] = False
    mask[3] = False
    per_sequence = (losses * mask).sum(1)
    kept = mask.any(1)
    expected = {
        "token-mean": losses[mask].mean(),
        "seq-mean-token-sum": per_sequence[kept].mean(),
        "seq-mean-token-mean": (per_sequence[kept] / mask.sum(1)[kept]).mean(),
    }[mode]
    weights = torch.stack(aggregation_weights(list(mask), mode))  # type: ignore[arg-type]
    torch.testing.assert_close((weights * losses).sum(), expected, rtol=1e-6, atol=1e-6)


def test_batch_without_trained_tokens_has_zero_weights() -> None:
    assert [w.tolist() for w in aggregation_weights([torch.zeros(3), torch.zeros(1)], "token-mean")] == [[0] * 3, [0]]
    assert aggregation_weights([], "token-mean") == []


def test_aggregation_rejects_bad_input() -> None:
    with pytest.raises(ValueError, match=r"unknown loss aggregation 'mean'.*token-mean"):
        aggregation_weights(MASKS, "mean")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="loss mask 1 trains token 0"):
        aggregation_weights([torch.tensor([0, 1]), torch.tensor([1, 1])], "token-mean")
    with pytest.raises(ValueError, match="loss mask 0 must be"):
        aggregation_weights([torch.tensor([0.0, 0.5])], "token-mean")


def test_sample_accepts_nan_where_there_is_no_weight() -> None:
    nan = float("nan")
    sample = Sample(
        tokens=torch.tensor([5, 6, 7]),
        weights=torch.tensor([0.0, 0.0, 1.0]),
        fields={"advantages": torch.tensor([nan, nan, 2.0])},
    )
    assert sample.length == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": torch.tensor([1, 2], dtype=torch.int32)}, "tokens must be"),
        ({"tokens": torch.tensor([[1, 2]])}, "tokens must be"),
        ({"tokens": torch.tensor([], dtype=torch.int64)}, "tokens must be"),
        ({"weights": torch.tensor([0.0, 1.0, 1.0])}, "3 entries for 2 tokens"),
        ({"weights": torch.tensor([1.0, 1.0])}, r"weights\[0\] is 1.0"),
        ({"weights": torch.tensor([0.0, -1.0])}, "not negative"),
        ({"weights": torch.tensor([0.0, float("nan")])}, "finite"),
        ({"fields": {"advantages": torch.tensor([0.0, float("inf")])}}, r"fields\['advantages'\] is not finite"),
        ({"fields": {"values": torch.tensor([0.0])}}, r"fields\['values'\] has 1 entries"),
        ({"fields": {"values": torch.tensor([0.0, 1.0], dtype=torch.float64)}}, r"fields\['values'\] must be"),
    ],
)
def test_sample_rejects(changes: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"tokens": torch.tensor([1, 2]), "weights": torch.tensor([0.0, 1.0])} | changes
    with pytest.raises(ValueError, match=message):
        Sample(**arguments)
