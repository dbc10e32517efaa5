"""The checkpoints of a run: which parts of an engine are saved, under which names, and how a run resumes.

In: an engine and the loop's state, or a checkpoint under any layout. Out: committed checkpoints; the restored engine.
Uses: `engine`, `errors`, `layout`, `optim`.
"""
