"""Score answers in worker processes.

In: the text of an answer, the prompt with its row, and why the answer ended. Out: a score. `pool` is the
trainer's side, `worker` the process; `math`, `gym` and `function` are the scorers that it runs.

Uses: `data`, `errors`, `rollout`.
"""
