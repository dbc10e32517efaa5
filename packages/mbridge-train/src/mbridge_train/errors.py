"""The error that a user of this package can cause and fix."""

from typing import ClassVar


class TrainError(Exception):
    """A problem in configuration or data. The message names what is wrong, why, and the fix.

    An application's ``main`` prints the message alone, without a traceback, and exits with ``exit_code``.
    Mistakes of calling code are ``ValueError`` instead, so that they keep their traceback.
    """

    exit_code: ClassVar[int] = 2
