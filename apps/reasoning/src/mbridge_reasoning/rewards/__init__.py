"""Score answers in worker processes.

In: the text of an answer, the prompt with its row, and why the answer ended. Out: a score. `pool` is the
trainer's side, `worker` the process; `math` and `function` are scorers that it runs.

Uses: `data`, `errors`, `rollout`.
"""
