"""Saving beside the training: a rank copies its tensors into shared memory, and a process beside it writes them.

In: what `begin_save` takes. Out: the same committed checkpoints, and news of them at each step.
Uses: `errors`, `formats`, `manifest`, `store`.
"""
