"""Checkpoints on a disk: saving on all ranks or none, verifying, loading, finding the one to resume from, pruning.

In: a directory, tensors and plain values of each rank. Out: committed checkpoints, and any piece of their parameters.
Uses: `errors`, `files`, `formats`, `manifest`.
"""
