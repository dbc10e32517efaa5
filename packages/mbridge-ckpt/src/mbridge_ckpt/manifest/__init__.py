"""The record that a checkpoint keeps of itself: layout of ranks, file names, checksums, tensors and their placement.

In: the facts of a save, or the untrusted text of a manifest. Out: typed records, and the text.
Uses: `errors`, `files`, `formats`.
"""
