"""What a checkpoint records about itself: layout of ranks, file names, checksums, tensors and their placement.

In: the facts of a save, or the text of a manifest that is not trusted. Out: typed records, and the text.
Uses: `errors`, `files`, `formats`.
"""
