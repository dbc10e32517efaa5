"""Work out what a config implies for the run itself.

In: a config. Out: the directories that the run writes, the number of its steps, and the lengths of the schedules.
Uses: `paths`, `problems`, `schema`.
"""
