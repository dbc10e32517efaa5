"""The optimizer: model chunks and settings go in, updated weights and the gradient norm come out.

Megatron-Core's, configured in one place, with a learning-rate schedule that depends on the step alone.

Uses: `errors`.
"""
