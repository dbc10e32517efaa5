"""The checkpoints of a run: what of an engine is saved, under which names, and how a run goes on from it.

In: an engine and the loop's state, or a checkpoint under any layout. Out: committed checkpoints; the engine as it was.
Uses: `engine`, `errors`, `layout`, `optim`.
"""
