"""The training engine: a global batch goes in; gradients, metrics, log probabilities and weights come out.

It plans micro-batches, collates them, runs Megatron-Core's pipeline schedule and reduces the results over all ranks.

Uses: `errors`, `layout`, `losses`, `memory`, `optim`.
"""
