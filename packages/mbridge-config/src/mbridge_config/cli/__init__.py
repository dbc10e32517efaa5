"""The command line: `mbridge-config`, the arguments that all apps share, and shell completion.

In: words of a command line. Out: printed reports, and the pages of the reference.
Uses: `check`, `compat`, `facts`, `fit`, `load`, `paths`, `plan`, `problems`, `rules`, `schema`.
"""
