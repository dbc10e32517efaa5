"""The error that a user can mend."""

from typing import ClassVar


class ModelError(Exception):
    """A model directory, a layout or a setting that cannot work; the message names it, the reason and the fix."""

    exit_code: ClassVar[int] = 2
