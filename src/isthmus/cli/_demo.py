"""The ``demo`` command; its files are written when all is done, so an interrupted run leaves nothing behind."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from isthmus.checkpoints import save_state
from isthmus.cli import _console as console
from isthmus.cli import _options as options
from isthmus.cli._texts import larger_hint
from isthmus.files import atomic_folder
from isthmus.report import write_report
from isthmus.states import state_of
from isthmus.study import DemoSettings, EpochRecord, run_demo, torch_threads

__all__ = ["demo", "write_demo"]


def demo(
    data: Annotated[
        str, typer.Option(help="`digits` (embedded), `mnist`, `fashion-mnist`, `cifar10`, …")
    ] = "digits",
    data_dir: options.DataDir = None,
    family: Annotated[
        str, typer.Option(help="`mlp`, `vgg16`, `vgg16_bn`, `resnet20`, `densenet`, …")
    ] = "mlp",
    width: Annotated[
        float | None, typer.Option(help="Units per hidden layer, or channel multiplier. Default 256, or 1.")
    ] = None,
    depth: Annotated[int, typer.Option(min=1, help="Hidden layers of the mlp.")] = 3,
    epochs: Annotated[int | None, typer.Option(min=1, help="Default 20 for digits, 10 otherwise.")] = None,
    learning_rate: Annotated[
        float, typer.Option(help="Of SGD with momentum 0.9, warm-up and cosine decay.")
    ] = 0.1,
    statistics: Annotated[
        int, typer.Option(min=2, help="Training examples on which activations are compared.")
    ] = 5000,
    points: Annotated[int, typer.Option(min=2, help="Positions on each line.")] = 11,
    threads: Annotated[
        int | None,
        typer.Option(
            min=1, help="Default 1 for digits, whose products are too small to share; else as torch."
        ),
    ] = None,
    symmetry: Annotated[
        str,
        typer.Option(
            metavar="CLASSES",
            help="What methods match by besides permutations: `all` that the network allows, or classes such as "
            "`signed,positive`; `permutations` for nothing more.",
        ),
    ] = "permutations",
    seed: options.Seed = 0,
    out: Annotated[
        Path, typer.Option(help="Folder for report.html, figures, result.json and checkpoints.")
    ] = Path("isthmus-demo"),
    json: options.Json = False,
) -> None:
    """Train two networks, align them by every method, and write a report.

    The networks differ in their initial values and in the order of the data. With the default settings nothing is
    downloaded and the whole run takes less than a minute.
    """
    size = width if width is not None else (256 if family == "mlp" else 1)
    settings = DemoSettings(
        data=data,
        family=family,
        width=size,
        depth=depth,
        epochs=epochs,
        learning_rate=learning_rate,
        statistics=statistics,
        points=points,
        seed=seed,
        symmetry=symmetry,
    )
    options.symmetry_of(symmetry)  # a mistake is told before anything is trained
    record, paths = write_demo(
        settings, data_dir, out, threads=1 if threads is None and data == "digits" else threads
    )
    console.emit(record, json, console.method_table(record))
    if not json:
        hint = (
            larger_hint([g["acts"] for g in record["symmetry"]["groups"]])
            if symmetry == "permutations"
            else ""
        )
        console.tell(f"\nReport: {paths['report']}" + (f"\n{hint}" if hint else ""))


def write_demo(
    settings: DemoSettings, data_dir: Path | None, out: Path, *, threads: int | None = None
) -> tuple[dict[str, Any], dict[str, Path]]:
    """Run the demo with progress bars and write all its files into a folder.

    Returns:
        The record, and the paths of report and figures by name.

    Raises:
        OutputError: the folder cannot be written (checked before training).
        IsthmusError: whatever the demo raises; nothing is written then.
    """
    with atomic_folder(out) as folder, torch_threads(threads), console.progress() as bar:
        training = bar.add_task("training", total=None)
        tasks: dict[str, Any] = {}

        def on_epoch(name: str, record: EpochRecord, epochs: int) -> None:
            bar.update(training, visible=False)
            if name not in tasks:
                tasks[name] = bar.add_task(f"training network {name}", total=epochs)
            text = f"training network {name} (loss {record.loss:.4f})"
            bar.update(tasks[name], completed=record.epoch, description=text)

        result = run_demo(
            settings,
            data_dir,
            on_epoch=on_epoch,
            on_stage=console.stages(bar),
            on_download=console.downloads(bar),
        )
        tell = console.stages(bar)
        tell("writing the report", 0, 1)
        record, arrays = result.comparison.record, result.comparison.arrays
        paths = write_report(record, arrays, folder)
        console.write_json(folder / "result.json", record)
        # The stub takes the names of arrays for numpy's own options.
        np.savez_compressed(folder / "relabelling.npz", **arrays)  # type: ignore[arg-type]
        for name, model in (("a", result.model_a), ("b", result.model_b)):
            save_state(folder / f"{name}.safetensors", state_of(model))
        tell("done", 1, 1)
    return record, {name: out / path.name for name, path in paths.items()}
