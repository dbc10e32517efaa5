"""Makes what the quickstart trains: handwritten digits as parquet files, and a tiny random Qwen3-VL.

In: the config. Out: files and a HuggingFace directory, which the run then reads as it reads those of a user.
Uses: `start`.
"""
