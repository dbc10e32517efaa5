"""Encoded examples as samples of the training engine. Pure functions."""

from collections.abc import Sequence

import torch
from mbridge_train.data.encode import Encoded
from mbridge_train.engine.batch import Sample, aggregation_weights


def training_samples(batch: Sequence[Encoded]) -> list[Sample]:
    """The global batch of one optimizer step, whose loss is the mean over all trained tokens of it."""
    weights = aggregation_weights([encoded.trained for encoded in batch], "token-mean")
    return [_sample(encoded, weight) for encoded, weight in zip(batch, weights, strict=True)]


def scoring_samples(batch: Sequence[Encoded]) -> list[Sample]:
    """The same sequences for log probabilities alone, with no weight on any token."""
    return [_sample(encoded, torch.zeros(len(encoded.tokens))) for encoded in batch]


def _sample(encoded: Encoded, weights: torch.Tensor) -> Sample:
    return Sample(tokens=encoded.tokens, weights=weights, vision=encoded.vision, position_ids=encoded.position_ids)
