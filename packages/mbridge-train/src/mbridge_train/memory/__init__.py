"""Memory of weights, gradients and optimizer state: moved to the host and back, or copied in bulk.

Storages stay where they are, so that every view of them stays valid.

Uses: `errors`, `optim`.
"""
