"""Read the facts of a model from its HuggingFace directory, without torch and without running code of others.

In: a directory. Out: geometry from config.json, the size of the tokenizer, the vision tower, faults of weight files.
Uses: `paths`, `problems`, `schema`.
"""
