"""Prompts to train and validate on.

In: json and jsonl files, or the name of a reasoning-gym task. Out: prompts with their token ids, their right answers
and all columns of their rows. Images of a prompt will be read by `mbridge_train.data` and travel in `Prompt`.

Uses: nothing of this package.
"""
