"""Import checkpoint trees that Megatron-LM wrote with `--ckpt-format torch`, with their optimizer state.

In: such a tree, whose pickles are not trusted. Out: a committed checkpoint, or the reason why it cannot be mapped.
Uses: `errors`, `formats`, `manifest`, `store`.
"""
