"""``isthmus study run | status | figures | export | presets``: studies from YAML files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from isthmus.cli import _console as console

if TYPE_CHECKING:
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
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output, for machines.")]


@study.command()
def run(
    file: Annotated[
        str, typer.Argument(metavar="FILE", help="A YAML file, or a preset (`isthmus study presets`).")
    ],
    out: Annotated[Path, typer.Option(help="Folder of the study; run again to go on.")],
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
    json: Json = False,
) -> None:
    """Run what is not yet recorded of a study; stop it whenever you like and run the same command to go on."""
    from isthmus.study import read_study, run_study

    config = read_study(file)
    console.usable_folder(out)
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
    _finish(status, json)


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


def _finish(status: StudyStatus, json: bool) -> None:
    """Print a status; failed units make the exit code 1."""
    lines = [
        f"{status.study}: "
        + ", ".join(f"{c['done']} of {c['all']} {kind} units done" for kind, c in status.counts.items())
        + f"; {_duration(status.seconds)} of work recorded"
        + ("" if not status.left else f"; {_duration(status.left)} left when the last unit ended")
    ]
    lines += [f"failed: {unit}: {message}" for unit, message in status.failed.items()]
    if status.blocked:
        lines.append(f"{status.blocked} units wait for failed ones; run again to try those once more")
    value: dict[str, Any] = status.to_dict()
    console.emit(value, json, "\n".join(lines))
    if status.failed:
        raise typer.Exit(console.CHECK_FAILED)
