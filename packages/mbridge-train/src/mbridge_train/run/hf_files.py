"""What transformers reads of a model's directory, and what is said of a file that it cannot use."""

from pathlib import Path
from typing import Any

from mbridge_train.errors import TrainError


def from_directory(kind: Any, directory: Path, name: str, **options: Any) -> Any:
    """`kind.from_pretrained(directory, **options)`.

    Args:
        kind: of transformers, such as `AutoTokenizer`.
        directory: of the model.
        name: of what is read, such as "tokenizer", for messages.

    Raises:
        TrainError: its files cannot be used.
    """
    try:
        return kind.from_pretrained(directory, **options)
    # A file that is broken raises anything: KeyError, TypeError, and of the tokenizers library Exception itself.
    except Exception as error:
        reason = str(error) if isinstance(error, OSError) else f"{type(error).__name__}: {error}"
        raise TrainError(
            f"{directory}: its {name} cannot be loaded: {reason.rstrip('.')}; copy the files of the {name} again, or "
            "correct them"
        ) from error
