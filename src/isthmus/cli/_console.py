"""What the commands share: consoles, progress bars, and the translation of errors into exit codes."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from torch._logging import set_logs  # pyright: ignore[reportPrivateImportUsage] (documented all the same)

from isthmus.checkpoints import check_format
from isthmus.errors import OutputError
from isthmus.files import atomic_folder, atomic_path

__all__ = [
    "CHECK_FAILED",
    "BAD_USE",
    "INTERRUPTED",
    "downloads",
    "emit",
    "method_table",
    "progress",
    "quiet_torch",
    "staged_files",
    "stages",
    "usable_folder",
]

CHECK_FAILED = 1
BAD_USE = 2
INTERRUPTED = 130


def out() -> Console:
    """Return the console of results (standard output)."""
    return Console(file=sys.stdout, width=_width(sys.stdout))


def log() -> Console:
    """Return the console of messages and progress (standard error)."""
    return Console(file=sys.stderr, width=_width(sys.stderr))


def _width(stream: Any) -> int | None:
    """Use the terminal's width, and enough for a table where there is no terminal."""
    return None if stream.isatty() else int(os.environ.get("COLUMNS", 120))


@contextmanager
def progress() -> Iterator[Progress]:
    """Show progress bars with time left on standard error; quiet where that is no terminal."""
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    console = log()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        yield bar


def stages(bar: Progress) -> Callable[[str, int, int], None]:
    """Return a callback that shows a stage, and how many of how many steps are done, as one bar."""
    task = bar.add_task("starting", total=None)

    def tell(stage: str, done: int, total: int) -> None:
        bar.update(task, description=stage, completed=done, total=total)

    return tell


def downloads(bar: Progress) -> Callable[[str, int, int | None], None]:
    """Return a callback that shows how much of a file has been downloaded, one bar per file."""
    tasks: dict[str, Any] = {}

    def tell(name: str, have: int, total: int | None) -> None:
        if name not in tasks:
            tasks[name] = bar.add_task(f"downloading {name}", total=total)
        bar.update(tasks[name], completed=have, total=total)

    return tell


def quiet_torch() -> None:
    """Keep torch from logging the trace of what our own message says in one sentence (unless ``TORCH_LOGS`` is set)."""
    if "TORCH_LOGS" not in os.environ:
        set_logs(all=logging.CRITICAL)


@contextmanager
def staged_files(*targets: Path | None) -> Iterator[list[Path]]:
    """Yield a path to write each checkpoint to; all of them take their places together, if all went well.

    Formats and folders are checked at once, before any long work; ``None`` is left out.

    Raises:
        CheckpointError: an unknown format.
        OutputError: a folder that cannot be made or written.
    """
    wanted = [target for target in targets if target is not None]
    for target in wanted:
        check_format(target)
    with ExitStack() as stack:
        yield [stack.enter_context(atomic_folder(target.parent)) / target.name for target in wanted]


def emit(value: Mapping[str, Any], as_json: bool, text: Any) -> None:
    """Print a result: one JSON object for machines, or text or a table for people."""
    if as_json:
        sys.stdout.write(json.dumps(value, indent=2, allow_nan=False) + "\n")
    else:
        out().print(text, highlight=False)


def usable_folder(path: Path) -> Path:
    """Create a folder for results if need be, and check that it can be written, before any long work.

    Raises:
        OutputError: it cannot be made or written.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / f".isthmus-{os.getpid()}.tmp"
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise OutputError(
            f"Cannot write to the output folder {path}: {error.strerror or error}. "
            "Choose another folder with --out."
        ) from error
    return path


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON file, whole or not at all."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def method_table(record: Mapping[str, Any]) -> Table:
    """Return the table of barriers of a comparison, one row per method."""
    split = record["split"]
    a, b = (record["endpoints"][end][split] for end in ("a", "b"))
    title = (
        f"{record['network']['name']}: the line between A ({split} loss {a['loss']:.4f}) "
        f"and B ({b['loss']:.4f})"
    )
    table = Table(title=title, title_justify="left", caption=_caption(record), caption_justify="left")
    table.add_column("method", no_wrap=True)
    for head in (
        "barrier (nats)",
        "vs none",
        "midpoint loss",
        "midpoint acc.",
        "function changed by",
        "seconds",
    ):
        table.add_column(head, justify="right")
    plain = record["methods"]["none"]["barrier"]
    best = min(m["barrier"] for m in record["methods"].values())
    for name, method in record["methods"].items():
        ratio = (
            ""
            if name == "none"
            else (f"÷ {plain / method['barrier']:.1f}" if method["barrier"] > 0 else "÷ ∞")
        )
        error = method["verification_error"]
        table.add_row(
            name,
            f"{method['barrier']:.4f}",
            ratio,
            f"{method['midpoint_loss']:.4f}",
            "" if method["midpoint_accuracy"] is None else f"{method['midpoint_accuracy']:.2%}",
            "" if error is None else f"{error:.1e}",
            f"{method['seconds']:.1f}",
            style="bold" if method["barrier"] == best else None,
        )
    return table


def _caption(record: Mapping[str, Any]) -> str:
    accuracies = [record["endpoints"][end][record["split"]]["accuracy"] for end in ("a", "b")]
    ends = "" if None in accuracies else f" Endpoints' accuracy: {accuracies[0]:.2%} and {accuracies[1]:.2%}."
    return f"Barrier: largest rise of the {record['split']} loss above the chord between the original A and B.{ends}"
