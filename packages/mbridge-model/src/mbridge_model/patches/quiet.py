"""Keep the chatter of the libraries underneath off the terminal, and in our log."""

import io
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from typing import Any

from mbridge_model.patches.patch import Patch, PatchTable

logger = logging.getLogger("mbridge_model")


def _divert(handle: Callable[..., None]) -> Callable[..., None]:
    def handle_or_divert(self: logging.Logger, record: logging.LogRecord) -> Any:
        if record.levelno >= logging.ERROR or record.name.startswith("mbridge_"):
            return handle(self, record)
        logger.debug("%s: %s", record.name, record.getMessage())

    return handle_or_divert


DIVERTED_LOGS = PatchTable(
    "log quietly",
    Patch(
        target="logging:Logger.handle",
        reason="some of upstream's loggers set their own level and handler, so no configuration reaches them all",
        wrapper=_divert,
    ),
)


@contextmanager
def quiet() -> Iterator[None]:
    """Send what upstream prints, warns of and logs below ERROR to our log, at DEBUG.

    The three channels belong to the process, so another thread's output is diverted in the meantime, too.
    """
    printed = io.StringIO()
    caught: list[warnings.WarningMessage] = []
    try:
        with DIVERTED_LOGS, redirect_stdout(printed), warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield
    finally:
        if text := printed.getvalue().strip():
            logger.debug("upstream printed: %s", text)
        for text in dict.fromkeys(f"{warning.category.__name__}: {warning.message}" for warning in caught):
            logger.debug("upstream warned: %s", text)
