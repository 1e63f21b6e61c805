"""The command line: ``isthmus demo | symmetry | align | line | merge``. Parsing, printing and exit codes only."""

from __future__ import annotations

import sys

__all__ = ["main"]


def main() -> None:
    """Run the command line; exit code 0 for success, 1 for a failed check, 2 for bad use."""
    try:
        from isthmus.cli._app import run
    except ModuleNotFoundError as error:
        if error.name not in ("typer", "rich", "click"):
            raise
        sys.stderr.write(
            f'The command line needs {error.name!r}, which is not installed: pip install "isthmus[cli]"\n'
        )
        raise SystemExit(2) from error
    raise SystemExit(run(sys.argv[1:]))
