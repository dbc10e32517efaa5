"""The error of this package that a user can cause and mend."""

from typing import ClassVar


class TrainError(Exception):
    """A problem in configuration or data. The message names what is wrong, why, and the fix.

    An application's ``main`` prints the message alone, without a traceback, and exits with ``exit_code``.
    Mistakes of calling code are ``ValueError`` instead, so that they keep their traceback.
    """

    exit_code: ClassVar[int] = 2
