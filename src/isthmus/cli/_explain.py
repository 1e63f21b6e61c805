"""The ``explain`` command: what a barrier consists of, and where it arises."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Group
from rich.table import Table

from isthmus.batches import Batches
from isthmus.cli import _console as console
from isthmus.cli import _options as options
from isthmus.cli._pair import data_for, load_pair, training_part
from isthmus.cli._relabel import Relabel
from isthmus.errors import DataError
from isthmus.explanation import Explanation
from isthmus.explanation import explain as explain_pair

__all__ = ["explain"]


def explain(
    a: options.CheckpointA,
    b: options.CheckpointB,
    data: Annotated[str, typer.Option(help=options.DATA_HELP)],
    model: options.OptionalModel = None,
    alignment: options.AlignmentFile = None,
    method: options.RelabelMethod = None,
    at: Annotated[float, typer.Option(help="Position between A (0) and B (1).")] = 0.5,
    part: Annotated[
        str | None, typer.Option(help="Part of the data to look at. Default `test`, else the first.")
    ] = None,
    data_dir: options.DataDir = None,
    normalise: options.NormaliseChoice = None,
    shape: options.Shape = None,
    limit: options.ExampleLimit = 10_000,
    batch_size: options.BatchSize = None,
    loss: Annotated[
        str | None,
        typer.Option(
            help="`cross_entropy`, `mse`, `bce` or `model`: the network's own. Default: the network's own for model "
            "folders, else cross-entropy."
        ),
    ] = None,
    repair: options.RepairChoice = None,
    stages: Annotated[
        int, typer.Option(min=0, help="Most steps in which layers are moved one after another; 0 for none.")
    ] = 12,
    out: Annotated[Path | None, typer.Option(help="A file for the numbers, .json.")] = None,
    trust_remote_code: options.TrustRemoteCode = False,
    seed: options.Seed = 0,
    json: options.Json = False,
) -> None:
    """Explain the loss between A and B (or B relabelled): its exact split, who carries it, and in which layers."""
    console.refuse_inputs({"--out": out}, [p for p in (a, b, alignment) if p is not None])
    chosen = Relabel(alignment, method, shape, None, seed)
    with console.progress() as bar:
        tell = console.stages(bar)
        tell("reading networks and data", 0, 2)
        pair = load_pair(a, b, model, trust_remote_code=trust_remote_code)
        found = data_for(data, data_dir, batch_size=batch_size, limit=limit, normalise=normalise, bar=bar)
        console.note(pair.notes)
        explained = explain_pair(
            pair.a,
            pair.b,
            _part(found, part),
            alignment=chosen.of(pair, found, tell),
            t=at,
            loss=loss,
            train_batches=training_part(found),
            repair=repair,
            stages=stages,
            on_stage=tell,
        )
    if out is not None:
        console.write_json(out, explained.to_dict())
    console.emit(explained.to_dict(), json, Group(*_tables(explained)))


def _part(data: dict[str, Batches], name: str | None) -> Batches:
    if name is None:
        return data.get("test", next(iter(data.values())))
    if name not in data:
        raise DataError(f"--part {name}: the data have the parts {', '.join(data)}.")
    return data[name]


def _tables(explained: Explanation) -> list[str | Table]:
    """Return the sentences, and tables of layers, stages and classes."""
    found: list[str | Table] = [str(explained)]
    if explained.layers:
        table = _table("layer", "units", "correlation", "variance left")
        for layer in explained.layers:
            table.add_row(layer.name, str(layer.units), _shown(layer.correlation), _shown(layer.variance))
        found += ["", table]
    if explained.stages:
        table = _table("layers up to", "rise", "added")
        for stage in explained.stages:
            table.add_row(stage.layers[-1], f"{stage.rise:.4g}", f"{stage.added:+.4g}")
        found += ["", table]
    if explained.split is not None and explained.split.classes:
        table = _table("class", "labels", "share of the rise", "mean rise")
        for kind in explained.split.classes:
            table.add_row(str(kind.label), str(kind.rows), f"{kind.share:.1%}", f"{kind.rise:.4g}")
        found += ["", table]
    return found


def _table(*heads: str) -> Table:
    table = Table()
    for k, head in enumerate(heads):
        table.add_column(head, justify="left" if k == 0 else "right")
    return table


def _shown(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"
