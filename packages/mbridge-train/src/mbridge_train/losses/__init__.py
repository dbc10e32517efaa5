"""Losses: per-token tensors go in, a weighted sum and metrics come out; advantages; log probabilities of split logits.

All are pure functions of tensors, but for the two all-reduces of a split vocabulary.

Uses: `errors`.
"""
