"""Make the data and the model of the quickstart: handwritten digits as parquet files, and a tiny random Qwen3-VL.

In: the config. Out: files and a HuggingFace directory, which the run then reads like a user's own.
Uses: `start`.
"""
