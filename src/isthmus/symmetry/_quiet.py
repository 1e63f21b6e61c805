"""Silence about attempts that fail: what PyTorch's exporter prints and logs on the way to an exception."""

from __future__ import annotations

import contextlib
import io
import logging
import sys
import threading
from collections.abc import Iterator

__all__ = ["quiet_failure"]


@contextlib.contextmanager
def quiet_failure() -> Iterator[None]:
    """Drop warnings and errors that PyTorch logs in this thread, and what is written to stderr if an exception comes.

    A failed export prints its half-made graph and logs the traceback of each operator. The exception says the same, and
    whoever catches it says what matters. What the model itself writes to stderr is shown after an export that succeeds.
    Debugging output that the user asked of PyTorch (``TORCH_LOGS``) is logged as ever.
    """
    own = threading.get_ident()

    def passes(record: logging.LogRecord) -> bool:
        return record.thread != own or record.levelno < logging.WARNING

    loggers = [
        logger
        for name, logger in list(logging.root.manager.loggerDict.items())
        if name.split(".")[0] == "torch" and isinstance(logger, logging.Logger)
    ]
    handlers = [handler for logger in loggers for handler in logger.handlers]
    written = io.StringIO()
    for handler in handlers:
        handler.addFilter(passes)
    try:
        with contextlib.redirect_stderr(written):
            yield
        sys.stderr.write(written.getvalue())
    finally:
        for handler in handlers:
            handler.removeFilter(passes)
