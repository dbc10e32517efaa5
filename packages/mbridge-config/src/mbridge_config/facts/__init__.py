"""Read the facts of a model from its HuggingFace directory, without torch and without running its code.

In: a directory. Out: geometry from config.json, the size of the tokenizer, the vision tower, faults in weight files.
Uses: `paths`, `problems`, `schema`.
"""
