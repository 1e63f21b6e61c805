"""The demo's files: written when everything is done, so an interrupted run leaves nothing behind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from isthmus.checkpoints import save_state
from isthmus.cli import _console as console
from isthmus.files import atomic_folder
from isthmus.report import write_report
from isthmus.states import state_of
from isthmus.study import DemoSettings, EpochRecord, run_demo
from isthmus.study._threads import torch_threads

__all__ = ["write_demo"]


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
