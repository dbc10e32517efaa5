"""The model of the quickstart: a tiny one is made and taught to be right some of the time.

In: prompts with sums. Out: an ordinary HuggingFace directory, from which the run starts as from any other.

Uses: `data`.
"""
