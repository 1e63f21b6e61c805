"""The ``line`` command: measure, draw, write."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import nn

from isthmus.batches import Batches
from isthmus.cli import _console as console
from isthmus.cli import _options as options
from isthmus.cli._pair import data_for, load_pair
from isthmus.cli._relabel import Relabel
from isthmus.cli._texts import larger_moves, told_groups
from isthmus.connectivity import Line
from isthmus.connectivity import line as measure
from isthmus.errors import DataError
from isthmus.files import atomic_folder
from isthmus.losses import is_pretrained
from isthmus.matching import Alignment, method_under, symmetry_text
from isthmus.report import draw_line

__all__ = ["line"]


def line(
    a: options.CheckpointA,
    b: options.CheckpointB,
    data: Annotated[str, typer.Option(help=options.DATA_HELP)],
    out: Annotated[Path, typer.Option(help="Folder for line.json and line.png.")],
    model: options.OptionalModel = None,
    alignment: options.AlignmentFile = None,
    method: options.RelabelMethod = None,
    symmetry: options.RelabelSymmetry = None,
    data_dir: options.DataDir = None,
    normalise: options.NormaliseChoice = None,
    shape: options.Shape = None,
    outputs: Annotated[
        list[str] | None,
        typer.Option(
            help="Output to score and to preserve, by name or position; repeat to preserve several. Default: all are "
            "preserved, and `logits`, else the first, is scored."
        ),
    ] = None,
    limit: options.ExampleLimit = None,
    batch_size: options.BatchSize = None,
    points: Annotated[
        str, typer.Option(help="Positions on the line, 2 or more, or `adaptive`: more where the loss rises.")
    ] = "11",
    tolerance: Annotated[
        float, typer.Option(help="For adaptive points: how much higher the loss may rise between them.")
    ] = 1e-3,
    loss: Annotated[
        str | None,
        typer.Option(
            help="`cross_entropy`, `mse`, `bce` or `model`: the network's own. Default: the network's own for model "
            "folders, else cross-entropy."
        ),
    ] = None,
    ignore_index: Annotated[
        int | None,
        typer.Option(help="Label of what does not count in cross-entropy, such as 255; -100 never does."),
    ] = None,
    refresh: options.RefreshChoice = "auto",
    refresh_data: Annotated[
        str | None,
        typer.Option(
            help="The part of the data on which BatchNorm statistics are recomputed. Default `train`, else the first."
        ),
    ] = None,
    repair: options.RepairChoice = None,
    lipschitz: Annotated[
        float | None,
        typer.Option(
            help="A bound on the slope of the loss, if one is known: adaptive points are then proven."
        ),
    ] = None,
    precision: Annotated[
        str | None, typer.Option(help="`bfloat16`: products of float32 networks in bfloat16.")
    ] = None,
    bootstrap: Annotated[int, typer.Option(help="Resamples for the standard errors; 0 for none.")] = 200,
    trust_remote_code: options.TrustRemoteCode = False,
    seed: options.Seed = 0,
    json: options.Json = False,
) -> None:
    """Measure loss and accuracy on the straight line from A to B (or to B relabelled)."""
    console.refuse_inputs({"--out": out}, [p for p in (a, b, alignment) if p is not None])
    count = _points(points)
    named = options.output_names(outputs)
    chosen = Relabel(alignment, method, shape, named, seed, symmetry)
    with atomic_folder(out) as folder, console.progress() as bar:
        tell = console.stages(bar)
        tell("reading networks and data", 0, 2)
        pair = load_pair(a, b, model, trust_remote_code=trust_remote_code)
        found = data_for(data, data_dir, batch_size=batch_size, limit=limit, normalise=normalise, bar=bar)
        console.note(pair.notes)
        relabelling = chosen.of(pair, found, tell)
        tell("measuring the line", 1, 2)
        measured = measure(
            pair.a,
            pair.b,
            found,
            points=count,
            tolerance=tolerance,
            lipschitz=lipschitz,
            loss=_ignoring(loss, ignore_index, pair.a),
            outputs=named[0] if named is not None and len(named) == 1 else None,
            refresh=options.refresh_of(refresh),
            refresh_batches=None if refresh_data is None else _part(found, refresh_data),
            repair=repair,
            alignment=relabelling,
            precision=precision,
            bootstrap=bootstrap,
            generator=torch.Generator().manual_seed(seed),
        )
        value = _write(measured, folder, relabelling)
    told = [
        str(measured),
        *_moves(relabelling),
        "",
        f"Written to {out}",
    ]
    console.emit(value, json, "\n".join(told))


def _write(measured: Line, folder: Path, relabelling: Alignment | None) -> dict[str, Any]:
    """Write ``line.json`` and ``line.png`` into an existing folder, and return what stands in the first."""
    name, value = "without relabelling", measured.to_dict()
    if relabelling is not None:
        name = method_under(relabelling.method, relabelling.symmetry)
        if relabelling.larger:
            value |= {"symmetry": symmetry_text(relabelling.symmetry), "groups": told_groups(relabelling)}
    picture = draw_line(
        {split: curve.to_dict() for split, curve in measured.curves.items()}, name, measured.unit
    )
    console.write_json(folder / "line.json", value)
    (folder / "line.png").write_bytes(picture)
    return value


def _moves(relabelling: Alignment | None) -> list[str]:
    """Return what acts on B's units, where that is more than permutations."""
    moves = [] if relabelling is None else larger_moves(relabelling)
    return ["B's units:", *moves] if moves else []


def _ignoring(loss: str | None, ignore_index: int | None, model: nn.Module) -> str | None:
    """Return a loss in which a label does not count."""
    if ignore_index is None:
        return loss
    if loss not in (None, "cross_entropy"):
        raise DataError(f"--ignore-index is an option of cross-entropy, found --loss {loss}.")
    if loss is None and is_pretrained(model):
        raise DataError(
            f"--ignore-index is an option of cross-entropy, and {type(model).__name__} is scored by its own loss, in "
            "which -100, or 255 for pixels, does not count. Let the data have that and leave the option out, or give "
            "--loss cross_entropy as well, which compares outputs and labels at the same place."
        )
    return f"cross_entropy(ignore_index={ignore_index})"


def _points(text: str) -> int | str:
    if text == "adaptive":
        return text
    if not text.isdecimal() or int(text) < 2:
        raise DataError(f"--points {text}: expected a whole number, 2 or more, or adaptive.")
    return int(text)


def _part(data: Mapping[str, Batches], name: str) -> Batches:
    if name not in data:
        raise DataError(f"--refresh-data {name}: the data have the parts {', '.join(data)}.")
    return data[name]
