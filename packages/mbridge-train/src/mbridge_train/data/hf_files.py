"""Load parts of a model's directory with transformers; a file that cannot be loaded is a user error."""

from pathlib import Path
from typing import Any

from mbridge_train.data.errors import DataError


def from_directory(kind: Any, directory: Path, name: str, **options: Any) -> Any:
    """Return ``kind.from_pretrained(directory, **options)``, of a class of transformers, such as `AutoTokenizer`.

    Raises `DataError` if a file of the part `name`, such as "tokenizer", is missing or broken.
    """
    try:
        return kind.from_pretrained(directory, **options)
    # A broken file can raise anything: KeyError, TypeError, and Exception itself from the tokenizers library.
    except Exception as error:
        reason = str(error) if isinstance(error, OSError) else f"{type(error).__name__}: {error}"
        raise DataError(
            f"{directory}: its {name} cannot be loaded: {reason.rstrip('.')}; copy the files of the {name} again, or "
            "correct them"
        ) from error
