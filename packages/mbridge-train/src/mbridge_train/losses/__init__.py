"""Losses: per-token tensors go in, a weighted sum and metrics come out.

Also advantages, and log probabilities of sharded logits. All are pure functions of tensors, apart from the two
all-reduces over a sharded vocabulary.

Uses: `errors`.
"""
