"""The optimizer: model chunks and settings go in, updated weights and the gradient norm come out.

It is Megatron-Core's, with a learning-rate schedule that depends on the step alone.

Uses: `errors`.
"""
