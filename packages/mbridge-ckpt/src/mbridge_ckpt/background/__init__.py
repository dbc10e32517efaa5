"""Save while training goes on: a rank copies its tensors into shared memory, and a separate process writes them.

In: the arguments of `begin_save`. Out: the same committed checkpoints, and an error at a later step if a save failed.
Uses: `errors`, `formats`, `manifest`, `store`.
"""
