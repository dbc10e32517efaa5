"""Propose layouts that fit in the memory of given GPUs.

In: a config, the report of `check` on it, GPUs and their memory. Out: layouts that pass every rule, best first, and,
if a plan exceeds the memory of a GPU, that problem with a layout that fixes it.
Uses: `check`, `plan`, `problems`, `rules`, `schema`.
"""
