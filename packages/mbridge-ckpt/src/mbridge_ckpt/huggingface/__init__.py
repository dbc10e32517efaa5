"""HuggingFace directories: written during a save as the weights stream by, or made from a checkpoint later.

In: named tensors, or a checkpoint with its recipe. Out: safetensors shards beside config, tokenizer and templates.
Uses: `errors`, `files`, `formats`, `manifest`, `store`.
"""
