"""The command `mbridge-ckpt`.

In: arguments. Out: text or JSON on stdout, error messages on stderr, an exit code.
Uses: `errors`, `huggingface`, `manifest`, `megatron_lm`, `reshard`, `store`.
"""
