"""Plan a run: which rank holds which layers, how a step is cut into micro-batches, how much memory a rank takes.

In: a config, the facts of its model and the number of ranks. Out: the parallel plan, and counts of parameters, bytes
and FLOPs.
Uses: `facts`, `schema`.
"""
