"""Losses: per-token tensors go in, a weighted sum and metrics come out; advantages; log probabilities of split logits.

All are pure functions of tensors, apart from the two all-reduces over a split vocabulary.

Uses: `errors`.
"""
