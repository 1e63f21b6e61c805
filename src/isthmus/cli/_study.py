"""``isthmus study run | status | report | figures | export | show | presets``: studies from YAML files."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.table import Table

from isthmus.cli import _console as console
from isthmus.cli._options import Json

if TYPE_CHECKING:
    from isthmus.report import BarrierTable, Spread
    from isthmus.study import AbstractExecutor, AbstractSink, Progress, StudyConfig, StudyStatus

__all__ = ["study"]

study = typer.Typer(
    name="study",
    no_args_is_help=True,
    help="Run a study written in YAML, or a preset: train, align and measure many pairs, and go on where it stopped.",
)


class Log(StrEnum):
    """Where a run can be shown."""

    TENSORBOARD = "tensorboard"
    WANDB = "wandb"


Folder = Annotated[Path, typer.Argument(metavar="DIR", help="Folder of the study.")]


@study.command()
def run(
    file: Annotated[
        str, typer.Argument(metavar="FILE", help="A YAML file, or a preset (`isthmus study presets`).")
    ],
    out: Annotated[
        Path | None, typer.Option(help="Folder of the study; run again to go on. `--dry-run` needs none.")
    ] = None,
    data_dir: Annotated[
        Path | None, typer.Option(help="Folder that holds the data set; nothing is downloaded then.")
    ] = None,
    executor: Annotated[
        Literal["in-process", "processes", "ray"], typer.Option(help="Where units run.")
    ] = "in-process",
    workers: Annotated[
        int | None, typer.Option(min=1, help="Processes (`processes`); default one per core.")
    ] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Threads of each unit; default the cores shared out.")
    ] = None,
    memory: Annotated[
        float | None,
        typer.Option(help="GiB that each unit may use (`processes`, Linux) or reserves (`ray`)."),
    ] = None,
    address: Annotated[
        str | None, typer.Option(help="Of the Ray cluster; default a fresh one on this machine.")
    ] = None,
    device: Annotated[str, typer.Option(help="`cpu` or `cuda`.")] = "cpu",
    log: Annotated[
        list[Log] | None,
        typer.Option(help="Show the run there too; repeat for both. `events.jsonl` is always written."),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Only say how many units there are and how long they should take."),
    ] = False,
    json: Json = False,
) -> None:
    """Run what is not yet recorded of a study; stop it whenever you like and run the same command to go on."""
    from isthmus.study import StudyError, check_continuation, check_device, read_study, run_study

    config = read_study(file)
    check_device(device, here=executor != "ray")
    if dry_run:
        _foresee(config, out, data_dir, executor, workers, threads, memory, device, json)
        return
    if out is None:
        raise StudyError("Give --out DIR, the folder of the study. Only --dry-run needs none.")
    check_continuation(config, out)
    console.usable_folder(out)
    with _stoppable(out):  # to the end: the summary is cut short like the work
        with (
            console.progress() as bar,
            _executor(executor, workers, threads, memory, address) as chosen,
            _sinks(log or (), config, out) as sinks,
        ):
            task = bar.add_task("reading data", total=None)

            def tell(progress: Progress) -> None:
                bar.update(task, description=_words(progress), completed=progress.done, total=progress.total)

            status = run_study(
                config, out, data_dir=data_dir, executor=chosen, device=device, on_progress=tell, sinks=sinks
            )
        _finish(status, json, out)


@study.command()
def status(folder: Folder, json: Json = False) -> None:
    """Show how many units are done, which failed and why."""
    from isthmus.study import study_status

    _finish(study_status(folder), json)


@study.command()
def export(
    folder: Folder,
    out: Annotated[Path | None, typer.Option(help="Folder to write to; default the study's.")] = None,
    json: Json = False,
) -> None:
    """Write records.parquet and records.csv, a row per pair, method and split, and run.json: what it took."""
    from isthmus.study import export_study

    if out is not None:
        console.usable_folder(out)
    table, text, took = export_study(folder, out)
    written = {"parquet": str(table), "csv": str(text), "run": str(took)}
    console.emit(written, json, "\n".join(f"Written to {path}" for path in written.values()))


@study.command()
def figures(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="A study's folder, or one with records.parquet.")
    ],
    out: Annotated[Path | None, typer.Option(help="Folder to write to; default DIR/figures.")] = None,
    json: Json = False,
) -> None:
    """Draw what the records hold, as PNG, SVG and PDF."""
    from isthmus.report import write_study_figures
    from isthmus.study import read_rows, transport_exponent

    rows = read_rows(folder)
    target = console.usable_folder(folder / "figures" if out is None else out)
    paths = write_study_figures(rows, target, rate=transport_exponent)
    console.emit({"figures": [str(p) for p in paths]}, json, "\n".join(f"Written to {p}" for p in paths))


@study.command()
def report(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="A study's folder, or one with records.parquet.")
    ],
    out: Annotated[Path | None, typer.Option(help="Folder to write to; default DIR.")] = None,
    json: Json = False,
) -> None:
    """Write study.html: the table of barriers and every figure on one page that needs nothing else."""
    from isthmus.report import write_study_report
    from isthmus.study import read_rows, read_run, transport_exponent

    rows = read_rows(folder)
    target = console.usable_folder(folder if out is None else out)
    page = write_study_report(
        rows, target, run=read_run(folder), rate=transport_exponent, notes=_notes(folder)
    )
    console.emit({"report": str(page)}, json, f"Written to {page}")


@study.command()
def show(
    preset: Annotated[str, typer.Argument(metavar="PRESET", help="One of `isthmus study presets`.")],
    json: Json = False,
) -> None:
    """Print the YAML of a preset, to begin a study of your own with: `isthmus study show width > mine.yaml`."""
    from isthmus.study import preset_text

    text = preset_text(preset)
    console.emit({"preset": preset, "yaml": text}, json, text.rstrip("\n"))


@study.command()
def presets(json: Json = False) -> None:
    """List the studies that ship with Isthmus."""
    from isthmus.study import preset_names, read_study

    found = {name: read_study(name).description for name in preset_names()}
    console.emit(found, json, "\n".join(f"{name:<22} {text}" for name, text in found.items()))


def _executor(
    name: str, workers: int | None, threads: int | None, memory: float | None, address: str | None
) -> AbstractExecutor:
    from isthmus.study import InProcess, LocalProcesses, OnRay, StudyError

    if name == "ray":
        return OnRay(address, threads, memory)
    if name == "processes":
        return LocalProcesses(workers, threads, memory)
    if memory is not None:
        raise StudyError(
            "--memory needs --executor processes or ray: this process cannot limit a part of itself."
        )
    return InProcess(threads)


@contextmanager
def _sinks(names: Sequence[Log], config: StudyConfig, out: Path) -> Iterator[list[AbstractSink]]:
    from isthmus.study import TensorBoard, WeightsAndBiases

    with ExitStack() as stack:
        opened: list[AbstractSink] = []
        for name in dict.fromkeys(names):
            sink = (
                TensorBoard(out / "tensorboard")
                if name is Log.TENSORBOARD
                else WeightsAndBiases(config.name, out, config.text)
            )
            opened.append(stack.enter_context(sink))
        yield opened


def _words(progress: Progress) -> str:
    """Return what just ended and the time left; the bar's own guess forgets units of half an hour."""
    if progress.unit is None or progress.outcome is None:
        return "running"
    left = "" if progress.left is None else f"; {_duration(progress.left)} left"
    return f"{progress.outcome.status}: {progress.unit.label}{left}"


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


@contextmanager
def _stoppable(out: Path) -> Iterator[None]:
    """Turn Ctrl-C and SIGTERM into a message that says what is kept."""

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    here = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, stop) if here else None
    try:
        yield
    except KeyboardInterrupt:
        raise console.Interrupted(_kept(out)) from None
    finally:
        if here:
            signal.signal(signal.SIGTERM, before)


def _kept(out: Path) -> str:
    """Say what of a study that was stopped is kept, and how to go on."""
    from isthmus.errors import IsthmusError
    from isthmus.study import study_status

    if not (out / "plan.json").is_file():
        return "Interrupted; nothing was written."
    try:
        counts = study_status(out).counts.values()
    except IsthmusError:  # such as a plan that another program has changed meanwhile
        return f"Interrupted; the units that were done are kept in {out}. Run the same command to go on."
    done, total = (sum(count[key] for count in counts) for key in ("done", "all"))
    return f"Interrupted: {done} of {total} units are done and kept in {out}; run the same command to go on."


def _foresee(
    config: StudyConfig,
    out: Path | None,
    data_dir: Path | None,
    executor: str,
    workers: int | None,
    threads: int | None,
    memory: float | None,
    device: str,
    json: bool,
) -> None:
    """Print how many units there are, and how long they should take."""
    from isthmus.study import estimate_study

    slots = 1
    if executor == "processes":
        with _executor(executor, workers, threads, memory, None) as chosen:
            slots, threads = chosen.slots, chosen.threads
    found = estimate_study(config, out, data_dir=data_dir, workers=slots, threads=threads, device=device)
    kinds = ", ".join(f"{c['all']} {kind}" for kind, c in found.units.items())
    total, done = (sum(c[key] for c in found.units.values()) for key in ("all", "done"))
    text = f"{found.study}: {total} units ({kinds})"
    text += f", {done} of them done" if done else ""
    text += f"; about {_duration(found.seconds)} to go with {found.workers} at a time"
    text += f" ({_duration(found.work)} of work)" if found.workers > 1 else ""
    console.emit(found.to_dict(), json, f"{text}.\nThis rests on {found.rests_on}.")


def _notes(folder: Path) -> list[str]:
    """Return what a reader of a study's page should know besides: what is missing, failed or unproven."""
    from isthmus.study import study_status

    if not (folder / "plan.json").is_file():
        return []
    status = study_status(folder)
    missing = sum(c["all"] - c["done"] for c in status.counts.values())
    return [
        *status.notes,
        *([f"{missing} units of the study are not done; their pairs are missing here."] if missing else []),
    ]


def _finish(status: StudyStatus, json: bool, folder: Path | None = None) -> None:
    """Print a status, and the barriers of a run; failed or damaged units make the exit code 1."""
    lines = [
        f"{status.study}: "
        + ", ".join(f"{c['done']} of {c['all']} {kind} units done" for kind, c in status.counts.items())
        + f"; {_duration(status.seconds)} of work recorded"
        + ("" if not status.left else f"; {_duration(status.left)} left when the last unit ended")
    ]
    lines += [f"failed: {unit}: {message}" for unit, message in status.failed.items()]
    lines += [
        f"damaged: {unit}: {message}; run again to make it anew" for unit, message in status.damaged.items()
    ]
    if status.blocked:
        lines.append(f"{status.blocked} units wait for failed ones; run again to try those once more")
    lines += [f"note: {note}" for note in status.notes]
    tables = [] if folder is None else _barriers(folder)
    value: dict[str, Any] = status.to_dict()
    if folder is not None:
        value["barriers"] = [table.to_dict() for table in tables]
    console.emit(value, json, "\n".join(lines))
    for table in () if json else tables:
        console.out().print()
        console.out().print(_table_of(table))
    if status.failed or status.damaged:
        raise typer.Exit(console.CHECK_FAILED)


def _barriers(folder: Path) -> list[BarrierTable]:
    from isthmus.report import barrier_tables
    from isthmus.study import StudyError, read_rows

    try:
        return barrier_tables(read_rows(folder))
    except StudyError:  # no pair has been measured: all of them failed, and are listed as such
        return []


def _table_of(table: BarrierTable) -> Table:
    """Return the barriers for the terminal: mean ± standard deviation over pairs."""
    title = f"Barrier (nats per example, {table.split})" + (f", {table.about}" if table.about else "")
    caption = "mean ± standard deviation over pairs; endpoints: mean loss, and accuracy"
    shown = Table(title=title, title_justify="left", caption=caption, caption_justify="left")
    for head in (table.swept.replace("_", " "), "pairs", "endpoints", *table.methods):
        shown.add_column(head, justify="right", no_wrap=head == "pairs")
    for row in table.rows:
        ends = "–" if row.loss is None else f"{row.loss.mean:.4f}"
        ends += "" if row.accuracy is None else f", {row.accuracy.mean:.1%}"
        cells = [_spread_of(row.barriers.get(method)) for method in table.methods]
        shown.add_row(f"{row.place:g}", str(row.pairs), ends, *cells)
    return shown


def _spread_of(spread: Spread | None) -> str:
    if spread is None:
        return "–"
    return f"{spread.mean:.3f}" + ("" if spread.deviation is None else f" ± {spread.deviation:.3f}")
