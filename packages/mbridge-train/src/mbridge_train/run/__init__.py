"""Runs of an app: from its command line to ranks, and the output of a run.

A command line and a loop `package.loop:run` come in. Checked configs, ranks in a process group, `metrics.jsonl`, the
report and traces go out. Ranks import the launcher before torch, so `launch` and `launch_rank` import neither torch nor
Megatron.
Uses: `errors`.
"""
