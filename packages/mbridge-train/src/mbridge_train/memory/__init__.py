"""Memory of weights, gradients and optimizer state: moved to the host and back, or copied in bulk.

Storages are emptied and refilled in place, so that all their views stay valid.

Uses: `errors`, `optim`.
"""
