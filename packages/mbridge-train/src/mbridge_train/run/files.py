"""Small files of a run: whole under their names or not there, and a full disk said as such."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mbridge_train.errors import TrainError


@contextmanager
def writing(path: str | os.PathLike[str]) -> Iterator[None]:
    """Raise `TrainError` for an `OSError` in the block, which writes `path`."""
    try:
        yield
    except OSError as error:
        raise TrainError(
            f"{path} cannot be written: {error.strerror}; make room or mend that, then go on from the last checkpoint "
            "with runner.resume_dir=auto"
        ) from None


def replace_text(path: Path, text: str) -> None:
    """Write `text` and give it the name `path` only then. Raises `TrainError`, and `path` is as it was."""
    temporary = path.with_name(path.name + ".tmp")
    with writing(path):
        try:
            temporary.write_text(text, encoding="utf-8")
            temporary.replace(path)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise
