"""The command line: ``isthmus demo | symmetry | align | line | merge``. Parsing, printing and exit codes only."""

from __future__ import annotations

import os
import sys

__all__ = ["main"]


def main() -> None:
    """Run the command line; exit code 0 for success, 1 for a failed check, 2 for bad use."""
    try:
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
    if code == INTERRUPTED:
        # Seen once on a busy machine: after our message Python ended by SIGINT (-2) in its own shutdown. All
        # cleaning up has been done by now, so that shutdown is left out.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    raise SystemExit(code)
