"""Running an app: from its command line to ranks, and what a run shows and leaves behind.

A command line and a loop `package.loop:run` come in. Checked configs, ranks in a process group, `metrics.jsonl`, the
report and traces go out. Ranks import the launcher before torch, so `launch` and `launch_rank` stay light.
Uses: `errors`.
"""
