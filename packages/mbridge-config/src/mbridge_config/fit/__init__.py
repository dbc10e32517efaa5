"""Propose layouts that fit the memory of given GPUs.

In: a config, the report of `check` on it, GPUs and their memory. Out: layouts that pass every rule, best first, and the
problem that a plan exceeds a GPU, with the layout that fixes it.
Uses: `check`, `plan`, `problems`, `rules`, `schema`.
"""
