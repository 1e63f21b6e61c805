"""The command line: ``isthmus demo | symmetry | align | line | merge``. Parsing, printing and exit codes only."""

from __future__ import annotations

import gc
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["main"]


def main() -> None:
    """Run the command line; exit code 0 for success, 1 for a failed check, 2 for bad use."""
    # Importing and tracing make millions of objects that stay; walking through them every 700 costs a second or two.
    gc.set_threshold(20_000, 10, 10)
    try:
        with _interruptible():
            from isthmus.cli._app import run
            from isthmus.cli._console import INTERRUPTED
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing in ("", "isthmus"):
            raise
        sys.stderr.write(
            f'The command line needs {missing!r}, which is not installed: pip install "isthmus[cli]", or '
            '"isthmus[all]" for data sets, reports and model folders as well.\n'
        )
        raise SystemExit(2) from error
    code = run(sys.argv[1:])
    # The result stands; an interruption of what is left, seconds of Python's own shutdown, must not change the code.
    for stop in (signal.SIGINT, signal.SIGTERM):
        signal.signal(stop, signal.SIG_IGN)
    if code == INTERRUPTED:  # all cleaning up has been done by now, so that shutdown is left out
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    raise SystemExit(code)


@contextmanager
def _interruptible() -> Iterator[None]:
    """End at once, and say so, when interrupted while packages are being imported.

    That takes seconds, and an exception raised in it would come out as a traceback, or be swallowed by a package that
    tries an import. Nothing has been begun that would have to be cleaned up.
    """
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:  # ignored, or somebody else's
        yield
        return

    def end(*_: object) -> None:
        os.write(2, b"Interrupted; nothing was written.\n")
        os._exit(130)

    signal.signal(signal.SIGINT, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
