"""The error of everything that a user can fix."""

from typing import ClassVar


class ModelError(Exception):
    """A model directory, a layout or a setting cannot work; the message names it, the reason and the fix."""

    exit_code: ClassVar[int] = 2
