"""Conversion by Megatron-Bridge: a HuggingFace directory becomes a provider, and its tensors become parameters.

In: a checked directory and a provider. Out: the built model with its weights, and the weights under their HuggingFace
names. `bridge.py` is the only module that imports megatron.bridge.

Uses: `directory`, `errors`, `patches`.
"""
