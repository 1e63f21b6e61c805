"""The ``merge`` command: align, average, write."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from isthmus import pretrained
from isthmus.checkpoints import check_format, save_state
from isthmus.cli import _console as console
from isthmus.cli import _folders as folders
from isthmus.cli import _options as options
from isthmus.cli._pair import are_files, data_for, load_pair, training_part
from isthmus.cli._relabel import Relabel
from isthmus.errors import DataError, IsthmusWarning
from isthmus.merging import merge as average
from isthmus.moments import chosen_refresh

__all__ = ["merge"]

_UNUSED = (
    "--data was not used: model folders are merged tensor by tensor, without running their network. To recompute "
    "running statistics, name one of the folders with --model and write a file: --out merged.safetensors."
)


def merge(
    a: options.CheckpointA,
    b: options.CheckpointB,
    out: Annotated[
        Path, typer.Option(help="What to write: .safetensors, .pt or .pth; a folder for model folders.")
    ],
    model: options.OptionalModel = None,
    alignment: options.AlignmentFile = None,
    method: options.RelabelMethod = None,
    symmetry: options.SymmetryChoice = "permutations",
    weight: Annotated[float, typer.Option(min=0.0, max=1.0, help="Weight of B in the average.")] = 0.5,
    data: options.OptionalData = None,
    data_dir: options.DataDir = None,
    normalise: options.NormaliseChoice = None,
    shape: options.Shape = None,
    outputs: options.OutputNames = None,
    limit: options.ExampleLimit = 10_000,
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
        alignment,
        align if method is None else method,
        shape,
        options.output_names(outputs),
        seed,
        options.symmetry_of(symmetry),
    )
    console.refuse_inputs({"--out": out}, [p for p in (a, b, alignment) if p is not None])
    read = partial(data_for, data, data_dir, batch_size=batch_size, limit=limit, normalise=normalise)
    value: dict[str, Any] = {"out": str(out), "weight": weight, "align": chosen.name, "refresh": None}
    with console.progress() as bar:
        tell = console.stages(bar)
        tell("reading networks and data", 0, 2)
        if pretrained.are_adapters([a, b]):
            ignored = {"--model": model, "--alignment": alignment, "--data": data}
            adapter = _merge_adapters(a, b, out, weight, chosen.method, [k for k, v in ignored.items() if v])
            value |= {"tensors": adapter.tensors, "way": adapter.way, "errors": dict(adapter.errors)}
            notes, unused = (str(adapter),), ""
        elif model is None and chosen.name is None and are_files(a, b) and data is None:
            check_format(out)
            merged = pretrained.merge_files([a, b], out, [1 - weight, weight], on_progress=_moving(tell))
            value |= {"tensors": merged.tensors, "notes": list(merged.notes)}
            notes, unused = merged.notes, ""
        elif folders.are_folders(a, b, model):
            folders.check_output(out, max_shard_size)
            if refresh == "batchnorm":
                raise DataError("--refresh runs the network; model folders are merged without loading it.")
            found = read(bar=bar)
            pair = folders.open_pair(a, b, trust_remote_code, training_part(found))
            if found and chosen.method in (None, "none", "weights"):
                warnings.warn(_UNUSED, IsthmusWarning, stacklevel=2)
            relabelling = chosen.of_folders(pair, training_part(found), tell)
            written = folders.merge_folders(
                pair, out, weight=weight, alignment=relabelling, max_shard_size=max_shard_size, bar=bar
            )
            value |= {"tensors": written.tensors, "unused": list(written.unknown)}
            notes, unused = (), folders.unused(written)
        else:
            check_format(out)
            found = read(bar=bar)
            with console.staged_files(out) as staged:
                networks = load_pair(a, b, model, trust_remote_code=trust_remote_code)
                batches = training_part(found)
                used = chosen_refresh(options.refresh_of(refresh), networks.a, batches)
                state = average(
                    [networks.a, networks.b],
                    [1 - weight, weight],
                    alignments=[chosen.of(networks, found, tell)],
                    batches=batches,
                    refresh=options.refresh_of(refresh),
                    model=networks.a,
                )
                save_state(staged[0], networks.as_stored(state))
            value |= {"tensors": len(state), "refresh": used, "notes": list(networks.notes)}
            notes, unused = networks.notes, ""
    how = f"after aligning by {chosen.name}" if chosen.name else "without alignment"
    told = [f"Merged A and B ({weight:g} of B) {how}; written to {out}{unused}"]
    console.emit(value, json, "\n".join(told + [f"Note: {note}" for note in notes]))


_WAYS: dict[str | None, pretrained.AdapterWay] = {None: "svd", "weights": "aligned", "none": "as they are"}
"""How adapters are averaged, by the method that the command was given."""


def _merge_adapters(
    a: Path, b: Path, out: Path, weight: float, method: str | None, ignored: list[str]
) -> pretrained.MergedAdapter:
    """Average two adapters, which need no network.

    Raises:
        DataError: an option that is of no use for them.
    """
    if ignored or method not in _WAYS:
        what = ignored[0] if ignored else f"--method {method}"
        raise DataError(
            f"{what}: adapters are averaged from their files alone: leave it out, which cuts the mean of the "
            "products to their rank, or give --method weights (factors rotated towards A's) or --method none (as they "
            "are)."
        )
    return pretrained.merge_adapters([a, b], out, [1 - weight, weight], way=_WAYS[method])


def _moving(tell: Callable[[str, int, int], None]) -> Callable[[str, int, int], None]:
    return lambda _, done, total: tell("merging", done, total)
