"""What the command line prints: aligned columns, readable sizes, JSON, and a progress bar on a terminal."""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Self


def size_text(count: float) -> str:
    """Format a byte count in binary units."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def print_columns(rows: Sequence[Sequence[object]]) -> None:
    """Print rows of equal length, each column as wide as its widest cell."""
    texts = [[str(cell) for cell in row] for row in rows]
    widths = [max(len(row[column]) for row in texts) for column in range(len(texts[0]))] if texts else []
    for row in texts:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def print_json(value: Any) -> None:
    """Print one JSON document; dataclasses become objects, paths become text."""
    print(json.dumps(value, indent=2, default=_plain))


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else asdict(value)


class ProgressBar:
    """Share of `total` bytes done, redrawn on one line of stderr; silent where stderr is no terminal."""

    def __init__(self, label: str, total: int) -> None:
        self._label, self._total, self._done = label, max(total, 1), 0
        self._shown = sys.stderr.isatty()

    def __call__(self, count: int) -> None:
        self._done += count
        if self._shown:
            share = min(self._done / self._total, 1.0)
            bar = "#" * round(30 * share)
            line = f"\r{self._label} [{bar:<30}] {share:4.0%} of {size_text(self._total)}"
            print(line, end="", file=sys.stderr, flush=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._shown:
            print("\r\033[K", end="", file=sys.stderr, flush=True)
