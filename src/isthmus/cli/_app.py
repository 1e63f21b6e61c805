"""The commands, the translation of errors into exit codes, and nothing else."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, Any

import torch
import typer

from isthmus import __version__
from isthmus.cli import _console as console
from isthmus.cli._align import align
from isthmus.cli._demo import demo
from isthmus.cli._explain import explain
from isthmus.cli._fold import fold
from isthmus.cli._line import line
from isthmus.cli._merge import merge
from isthmus.cli._study import study
from isthmus.cli._symmetry import symmetry
from isthmus.cli._theory import theory
from isthmus.errors import IsthmusError, VerificationError

__all__ = ["app", "run"]

app = typer.Typer(
    name="isthmus",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    help="""Linear mode connectivity modulo permutation.

Two networks trained from different seeds look unrelated. Isthmus finds the relabelling of one network's hidden units
that brings it close to the other, proves that it changes nothing, measures the straight line between them, and merges.

Start with `isthmus demo`. For your own networks write a function that builds the module, and call its place TARGET:
`package.module:factory`.""",
)


def _tell_version(wanted: bool) -> None:
    if wanted:
        console.out().print(f"isthmus {__version__}", highlight=False)
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_tell_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Take the options that belong to no command."""


for command in (demo, symmetry, fold, align, line, explain, merge):
    app.command()(command)
app.add_typer(study)
app.add_typer(theory, name="theory")


# The base of all usage errors; Typer brings its own copy of Click in new versions and exports only subclasses.
_USAGE_ERROR: Any = next(c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException")
_TRACEBACK = "ISTHMUS_TRACEBACK"
"""An environment variable: set, it shows where an unexpected error arose."""


def run(arguments: Sequence[str]) -> int:
    """Run a command and return its exit code; errors are printed as one message, without a traceback."""
    console.quiet_torch()
    try:
        with _current_folder_importable(), console.warnings_as_lines():
            result = typer.main.get_command(app).main(
                args=list(arguments), prog_name="isthmus", standalone_mode=False
            )
            sys.stdout.flush()
    except _USAGE_ERROR as error:
        console.complain(_usage(error))
        return console.BAD_USE
    except console.Interrupted as stopped:
        console.complain(str(stopped))
        return console.INTERRUPTED
    except (KeyboardInterrupt, typer.Abort):
        result = console.INTERRUPTED
    except VerificationError as error:
        console.complain(f"Check failed: {error}")
        return console.CHECK_FAILED
    except IsthmusError as error:
        console.complain(f"Error: {error}")
        return console.BAD_USE
    except BrokenPipeError:
        return _reader_has_gone()
    except SystemExit as error:
        if isinstance(error.__context__, BrokenPipeError):  # as Click turns a broken pipe inside a command
            return _reader_has_gone()
        console.complain(
            f"Error: code of yours (a TARGET or data) ended the program with SystemExit: {error}. Nothing was "
            "written; let it return or raise an error that says what is wrong."
        )
        return console.BAD_USE
    except (MemoryError, torch.OutOfMemoryError) as error:
        console.complain(f"Error: out of memory{f': {error}' if str(error) else ''}. {_SMALLER}")
        return console.BAD_USE
    except OSError as error:
        where = "" if error.filename is None else f"{error.filename}: "
        console.complain(f"Error: {where}{error.strerror or error}.")
        return console.BAD_USE
    except Exception as error:  # a fault of ours: said as such, not shown as a wall of text
        if os.environ.get(_TRACEBACK):
            traceback.print_exc()
        console.complain(
            f"Internal error: {type(error).__name__}: {error}. This is a fault of Isthmus, please report it; "
            f"{_TRACEBACK}=1 shows where it arose."
        )
        return console.INTERNAL
    if result == console.INTERRUPTED:
        console.complain("Interrupted; nothing was written.")
    return result if isinstance(result, int) else 0


_SMALLER = "Use a smaller --batch-size or --limit, or a machine with more memory."


def _usage(error: Any) -> str:
    """Return what is wrong with the words of a command, and where its help is."""
    context = getattr(error, "ctx", None)
    path = "isthmus" if context is None else context.command_path
    return f"Error: {error.format_message()}\nTry '{path} --help' for help."


def _reader_has_gone() -> int:
    """Stop quietly where standard output was closed, as by ``isthmus … | head``."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


@contextmanager
def _current_folder_importable() -> Iterator[None]:
    """Look up the user's modules in the current folder first, as ``python -m`` does."""
    before = list(sys.path)
    sys.path.insert(0, os.getcwd())
    try:
        yield
    finally:
        sys.path[:] = before
