"""The file formats of tensors: torch.save's zip and safetensors, read without trusting them.

In: an open file, or plain containers with tensors. Out: names, shapes and dtypes without running or loading anything;
single tensors or rows of them; files that torch and safetensors read.
Uses: `errors`, `files`.
"""
