"""Megatron's configuration: the changes to the provider that Megatron-Bridge returns.

In: that provider, config.json, the family, the layout, the precision, the backend and the user's overrides. Out: the
finalized provider, with each change in the log.

Uses: `errors`, `families`, `kernels`, `parallel`, `patches`, `torch_backend`, `vision`.
"""
