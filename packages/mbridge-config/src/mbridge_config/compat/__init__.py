"""Hold the keys of RLinf's YAML files that set nothing here, in one table.

In: the schema. Out: for each such key why it has no effect, the key that it is an alias of, the fact of the model that
it is checked against, or why it is refused; and all keys of a kind of run, these included.
Uses: `schema`.
"""
