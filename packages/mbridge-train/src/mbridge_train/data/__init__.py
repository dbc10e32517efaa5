"""Read and encode chats, questions and images, for SFT and for RL on images.

In: files of rows (parquet, jsonl), and a model's tokenizer, chat template and image processor. Out: global batches of
encoded rows in an order that can be resumed at any step, with the pixels of this rank's rows only.
Needs pyarrow, pillow and torchvision: `pip install mbridge-train[data]`.
Uses: `errors`.
"""
