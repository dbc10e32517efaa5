"""Declare every key that does something: one dataclass a section, one field a key.

In: nothing. Out: the config classes of all kinds of runs, what is declared of each key (type, default, range, meaning),
and the record of where the values of a config were set.
Uses: `problems`.
"""
