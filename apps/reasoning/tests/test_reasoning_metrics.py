"""Metrics of a step, made from those of its minibatches."""

from mbridge_reasoning.metrics import minibatch_metrics


def test_maxima_stay_maxima_over_minibatches() -> None:
    """The largest log ratio was averaged, so that one broken minibatch of four showed a quarter of its value."""
    minibatches = [
        {"policy/max_abs_log_ratio": 0.5, "policy/kl": 1.0, "policy/grad_norm": 3.0},
        {"policy/max_abs_log_ratio": 8.0, "policy/kl": 2.0},
        {"policy/max_abs_log_ratio": 0.5, "policy/kl": 6.0},
    ]
    expected = {"policy/max_abs_log_ratio": 8.0, "policy/kl": 3.0, "policy/grad_norm": 3.0}
    assert minibatch_metrics(minibatches) == expected
