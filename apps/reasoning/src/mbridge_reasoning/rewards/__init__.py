"""Scores answers in worker processes.

In: the text of an answer, the prompt with its row, and why the answer ended. Out: a score. `pool` is the side of the
trainer, `worker` the process; `math`, `gym` and `function` are what it runs.

Uses: `data`, `errors`, `rollout`.
"""
