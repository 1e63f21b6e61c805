"""What the commands share: consoles, progress bars, and the translation of errors into exit codes."""

from __future__ import annotations

import json
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TextIO

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

from isthmus.batches import Batches
from isthmus.checkpoints import check_format
from isthmus.errors import IsthmusWarning, OutputError, printable
from isthmus.files import atomic_folder, atomic_path, refuse_overwriting
from isthmus.report import NATS, unit_of
from isthmus.streams import guarded

__all__ = [
    "CHECK_FAILED",
    "BAD_USE",
    "INTERNAL",
    "INTERRUPTED",
    "Interrupted",
    "complain",
    "downloads",
    "emit",
    "method_table",
    "note",
    "progress",
    "quiet_torch",
    "refuse_inputs",
    "staged_files",
    "stages",
    "tell",
    "tracked",
    "usable_folder",
    "warnings_as_lines",
]

CHECK_FAILED = 1
BAD_USE = 2
INTERNAL = 3
INTERRUPTED = 130


class Interrupted(Exception):
    """A command was stopped by its user; the message says what of its work is kept."""


def out() -> Console:
    """Return the console of results (standard output)."""
    return _plain(sys.stdout)


def log() -> Console:
    """Return the console of messages and progress (standard error)."""
    return _plain(sys.stderr)


def _plain(stream: TextIO) -> Console:
    """Return a console that takes no markup: names come from files, and ``[x]`` in them is a name."""
    return Console(file=stream, width=_width(stream), markup=False, emoji=False, highlight=False)


def _width(stream: Any) -> int | None:
    """Use the terminal's width, and enough for a table where there is no terminal."""
    return None if stream.isatty() else int(os.environ.get("COLUMNS", 120))


@contextmanager
def progress() -> Iterator[Progress]:
    """Show progress bars with time left on standard error; quiet where that is no terminal."""
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
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


class _Tracked:
    """Batches that move a bar as they are used, on every pass."""

    def __init__(self, batches: Batches, bar: Progress, name: str) -> None:
        self._batches, self._bar, self._name = batches, bar, name
        self._task: Any = None

    def __iter__(self) -> Iterator[Any]:
        total = len(self._batches) if hasattr(self._batches, "__len__") else None  # type: ignore[arg-type]
        if self._task is None:
            self._task = self._bar.add_task(f"batches of {self._name}", total=total)
        self._bar.reset(self._task, total=total)
        for batch in guarded(self._batches, f"data {self._name!r}"):
            yield batch
            self._bar.advance(self._task)


def tracked(data: Mapping[str, Batches], bar: Progress) -> dict[str, Batches]:
    """Return the same named batches, each with a bar that moves as they are used."""
    return {name: _Tracked(batches, bar, name) for name, batches in data.items()}


def complain(message: str) -> None:
    """Write a message to standard error."""
    _write(sys.stderr, message)


def note(notes: Iterable[str]) -> None:
    """Write what was done on the way, as lines on standard error."""
    for text in notes:
        complain(f"Note: {text}")


def tell(message: str) -> None:
    """Write a result to standard output."""
    _write(sys.stdout, message)


def _write(stream: TextIO, message: str) -> None:
    """Write text in whatever encoding the stream has, without the control characters that names may hold."""
    message = printable(message, len(message), lines=True)
    encoding = stream.encoding or "utf-8"
    stream.write((message + "\n").encode(encoding, "backslashreplace").decode(encoding))


_said: list[str] = []
"""Texts that the running command has printed as its result."""


_pending: list[str] = []
"""Warnings of the running command that are still to be printed."""


@contextmanager
def warnings_as_lines() -> Iterator[None]:
    """Print warnings about results at the end, a line each and each once; others at once, as Python does.

    What the printed result says already, as a note, is not said again.
    """
    found = _pending
    before = warnings.showwarning

    def show(message: Warning | str, category: type[Warning], *rest: Any, **options: Any) -> None:
        if issubclass(category, IsthmusWarning):
            if str(message) not in found:
                found.append(str(message))
        else:
            before(message, category, *rest, **options)

    _said.clear()
    _pending.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("always", IsthmusWarning)
        warnings.showwarning = show
        try:
            yield
        finally:
            for message in found:
                if not any(message in text for text in _said):
                    complain(f"Warning: {message}")


def refuse_inputs(outputs: Mapping[str, Path | None], inputs: Iterable[Path]) -> None:
    """Check, before any work, that nothing is written onto or into what is read, nor twice onto the same path.

    Args:
        outputs: from the option's name to the path it names.
        inputs: files and folders that are read.

    Raises:
        OutputError: naming both.
    """
    read = list(inputs)
    written: dict[Path, str] = {}
    for option, path in outputs.items():
        if path is None:
            continue
        for given in read:
            refuse_overwriting(path, [given], folder=given.is_dir())
        if path.resolve() in written:
            raise OutputError(
                f"{option} and {written[path.resolve()]} name the same path {path}. Choose two."
            )
        written[path.resolve()] = option


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
        text = json.dumps(value, ensure_ascii=False)
        left = [w for w in _pending if json.dumps(w, ensure_ascii=False)[1:-1] not in text]
        value = {**value, "warnings": left} if left else value
        sys.stdout.write(json.dumps(value, indent=2, allow_nan=False) + "\n")
    elif isinstance(text, str):
        _said.append(text)
        tell(text)
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
        "barrier (nats)" if unit_of(record) == NATS else f"barrier ({unit_of(record)})",
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
