"""Cut a checkpoint for other tensor- and pipeline-parallel sizes, tensor by tensor and without Megatron.

In: a committed checkpoint and the new sizes. Out: a committed checkpoint in another directory.
Uses: `errors`, `formats`, `huggingface`, `manifest`, `store`.
"""
