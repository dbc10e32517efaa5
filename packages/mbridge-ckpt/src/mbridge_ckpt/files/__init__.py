"""Files and paths on a disk, whatever their content.

In: paths and bytes. Out: files that are durable and hashed as they are written or read, atomic renames, and paths that
were checked to stay inside a directory.
Uses: `errors`.
"""
