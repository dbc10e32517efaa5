"""Keeps the chatter of the libraries underneath off the terminal."""

import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout

logger = logging.getLogger("mbridge_model")


@contextmanager
def quiet() -> Iterator[None]:
    """Hold back prints, Python warnings, and log records below ERROR; what was printed goes to our log at DEBUG.

    Upstream warns of every optional GPU library that is missing, of its own deprecated calls, and prints progress.
    Some of its loggers set their own level and handler, so only the process-wide threshold reaches them all.
    """
    printed = io.StringIO()
    threshold = logging.root.manager.disable
    logging.disable(max(threshold, logging.WARNING))
    try:
        with redirect_stdout(printed), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(threshold)
        if text := printed.getvalue().strip():
            logger.debug("upstream printed: %s", text)
