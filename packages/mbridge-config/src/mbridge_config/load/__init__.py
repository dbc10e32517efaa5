"""Compose a typed config from a YAML file and `key=value` arguments.

In: the name of a config and arguments. Out: a config with every interpolation resolved, every value converted to its
type and every default filled in. It also records where each key was set, and all mistakes.
Uses: `compat`, `paths`, `problems`, `schema`.
"""
