"""Declare every key that does something: one dataclass per section, one field per key.

In: nothing. Out: the config classes of all kinds of runs, the declaration of each key (type, default, range, meaning),
and the record of where the values of a config were set.
Uses: `problems`.
"""
