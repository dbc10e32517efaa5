"""Make the model of the quickstart, a tiny one that is taught to be right some of the time.

In: prompts with sums. Out: an ordinary HuggingFace directory, from which the run starts as it does from any other.

Uses: `data`.
"""
