"""Keys of other trainers' YAML files (RLinf's) that change nothing here, in one table.

In: the schema. Out: for each such key its type and the reason why it has no effect, the key that it is an alias of, the
fact of the model that it is checked against, or why its other values are refused; and all keys of a kind of run.
Uses: `schema`.
"""
