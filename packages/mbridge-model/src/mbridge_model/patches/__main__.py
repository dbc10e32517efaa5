"""List every patch of a library: python -m mbridge_model.patches [package ...].

The packages, mbridge_model unless some are named, are searched for tables.
"""

import sys
from collections.abc import Iterator
from importlib import import_module
from pkgutil import walk_packages

from mbridge_model.patches.cpu import allow_missing_transformer_engine, enable_cpu
from mbridge_model.patches.patch import PatchTable


def tables(package: str) -> Iterator[tuple[str, PatchTable]]:
    """Import every module of `package` and yield its tables, each with the module that defines it."""
    found: set[int] = set()
    for module in walk_packages(import_module(package).__path__, f"{package}."):
        if module.name.endswith("__main__"):
            continue
        for value in list(vars(import_module(module.name)).values()):
            if isinstance(value, PatchTable) and id(value) not in found:
                found.add(id(value))
                yield module.name, value


def main(packages: list[str]) -> None:
    """Print the tables."""
    enable_cpu()
    allow_missing_transformer_engine()
    for package in packages or ["mbridge_model"]:
        for module, table in tables(package):
            print(f"\nTo {table.purpose} ({module}):")
            for patch in table.patches:
                print(f"  {patch.target}: {patch.reason}")


if __name__ == "__main__":
    main(sys.argv[1:])
