"""Writing the data of the quickstart: real handwritten digits as multiple-choice questions.

The images are the 1,797 of scikit-learn's `load_digits` (8 x 8 pixels, from UCI's "Optical Recognition of Handwritten
Digits"), which come with the library. The files have the columns of the Robo2VLM-1 data set, so the quickstart reads
them as it would read that data set.
"""

import io
import random
import uuid
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

QUESTION = "Which digit is this?"
SCALE = 4
"""Pixels along each side per original pixel: 32 x 32 in all, so that even a tiny patch shows a part of a stroke."""

HELD_OUT = 5
"""Every fifth image of each digit is held out for evaluation: 356 of 1,797, about equally many of each digit."""

_ROWS_IN_GROUP = 128
_SCHEMA = pa.schema(
    {
        "id": pa.string(),
        "question": pa.string(),
        "choices": pa.string(),
        "correct_answer": pa.int64(),
        "image": pa.struct({"bytes": pa.binary(), "path": pa.string()}),
    }
)


def write_digits(directory: str | Path) -> tuple[Path, Path]:
    """Write `train/digits.parquet` and `eval/digits.parquet` under `directory`, and return the two directories.

    Each file appears whole or not at all, so several processes may do this at once; a file that already holds the right
    rows is left alone. The split and the order of the choices are always the same.
    """
    directory = Path(directory)
    for name, table in _tables().items():
        _write(directory / name / "digits.parquet", table)
    return directory / "train", directory / "eval"


def _tables() -> dict[str, pa.Table]:
    import numpy
    from PIL import Image
    from sklearn.datasets import load_digits  # takes seconds to import

    rows: dict[str, list[dict[str, object]]] = {"train": [], "eval": []}
    seen: Counter[int] = Counter()
    digits = load_digits()
    for index, (pixels, digit) in enumerate(zip(digits.images, digits.target.tolist(), strict=True)):
        seen[digit] += 1
        # 16 grey levels, as the strokes' density; each pixel becomes a square.
        grey = numpy.kron(pixels * (255 / 16), numpy.ones((SCALE, SCALE))).round().astype(numpy.uint8)
        png = io.BytesIO()
        Image.fromarray(grey).save(png, format="PNG")
        choices = random.Random(index).sample([str(choice) for choice in range(10)], 10)
        rows["eval" if seen[digit] % HELD_OUT == 0 else "train"].append(
            {
                "id": f"digit-{index:04}",
                "question": QUESTION,
                "choices": repr(choices),
                "correct_answer": choices.index(str(digit)),
                "image": {"bytes": png.getvalue(), "path": f"digit-{index:04}.png"},
            }
        )
    return {name: pa.Table.from_pylist(part, schema=_SCHEMA) for name, part in rows.items()}


def _write(path: Path, table: pa.Table) -> None:
    try:
        if pq.read_table(path).equals(table):
            return
    except (OSError, pa.ArrowException):
        pass  # missing or damaged
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}-{uuid.uuid4().hex}")
    try:
        pq.write_table(table, temporary, row_group_size=_ROWS_IN_GROUP)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
