"""The ``merge`` command: align, average, write."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from isthmus.checkpoints import check_format, save_state
from isthmus.cli import _console as console
from isthmus.cli import _folders as folders
from isthmus.cli import _options as options
from isthmus.cli._pair import data_for, load_pair, training_part
from isthmus.cli._relabel import Relabel
from isthmus.errors import DataError
from isthmus.merging import merge as average

__all__ = ["merge"]


def merge(
    a: options.CheckpointA,
    b: options.CheckpointB,
    out: Annotated[
        Path, typer.Option(help="What to write: .safetensors, .pt or .pth; a folder for model folders.")
    ],
    model: options.OptionalModel = None,
    alignment: options.AlignmentFile = None,
    method: options.RelabelMethod = None,
    weight: Annotated[float, typer.Option(min=0.0, max=1.0, help="Weight of B in the average.")] = 0.5,
    data: options.OptionalData = None,
    data_dir: options.DataDir = None,
    shape: options.Shape = None,
    outputs: options.OutputNames = None,
    limit: options.Limit = 10_000,
    batch_size: options.BatchSize = None,
    refresh: options.RefreshChoice = "auto",
    max_shard_size: options.MaxShardSize = "5GB",
    trust_remote_code: options.TrustRemoteCode = False,
    seed: options.Seed = 0,
    json: options.Json = False,
    align: Annotated[str | None, typer.Option(metavar="METHOD", hidden=True)] = None,
) -> None:
    """Average two networks, after relabelling B if asked to, and write an ordinary checkpoint."""
    chosen = Relabel(
        alignment, align if method is None else method, shape, options.output_names(outputs), seed
    )
    console.refuse_inputs({"--out": out}, [p for p in (a, b, alignment) if p is not None])
    in_folders = folders.are_folders(a, b, model)
    if in_folders:
        folders.check_output(out, max_shard_size)
        if refresh == "batchnorm":
            raise DataError("--refresh runs the network; model folders are merged without loading it.")
    else:
        check_format(out)
    value: dict[str, Any] = {"out": str(out), "weight": weight, "align": chosen.name, "refresh": None}
    with console.progress() as bar:
        console.stages(bar)("reading networks and data", 0, 2)
        found = data_for(data, data_dir, batch_size=batch_size, limit=limit, bar=bar)
        if in_folders:
            pair = folders.open_pair(a, b, trust_remote_code, training_part(found))
            relabelling = chosen.of_folders(pair, training_part(found))
            written = folders.merge_folders(
                pair, out, weight=weight, alignment=relabelling, max_shard_size=max_shard_size, bar=bar
            )
            value |= {"tensors": written.tensors, "unused": list(written.unknown)}
            unused = folders.unused(written)
        else:
            with console.staged_files(out) as staged:
                networks = load_pair(a, b, model, trust_remote_code=trust_remote_code)
                value["refresh"] = options.refresh_of(refresh)
                state = average(
                    [networks.a, networks.b],
                    [1 - weight, weight],
                    alignments=[chosen.of(networks, found)],
                    batches=training_part(found),
                    refresh=value["refresh"],
                    model=networks.a,
                )
                save_state(staged[0], state)
            value["tensors"], unused = len(state), ""
    how = f"after aligning by {chosen.name}" if chosen.name else "without alignment"
    console.emit(value, json, f"Merged A and B ({weight:g} of B) {how}; written to {out}{unused}")
