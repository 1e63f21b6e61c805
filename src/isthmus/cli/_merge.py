"""The ``merge`` command: align, average, write."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from isthmus import pretrained
from isthmus.batches import Batches
from isthmus.checkpoints import check_format, save_state
from isthmus.cli import _console as console
from isthmus.cli import _folders as folders
from isthmus.cli import _options as options
from isthmus.cli._pair import are_files, data_for, example_for, load_pair, training_part
from isthmus.cli._relabel import Relabel
from isthmus.cli._texts import larger_moves, told_groups
from isthmus.errors import DataError, IsthmusWarning
from isthmus.matching import Alignment, symmetry_text
from isthmus.merging import merged as average
from isthmus.moments import chosen_refresh, keeps_running_statistics
from isthmus.paths import check_repair, needs_data

__all__ = ["merge"]

_UNUSED = (
    "--data was not used: model folders are averaged tensor by tensor, without running them, where they have no "
    "running statistics to recompute. --repair runs them."
)


@dataclass(frozen=True)
class _Wanted:
    """What the options say, for all ways of merging."""

    a: Path
    b: Path
    out: Path
    weight: float
    chosen: Relabel
    read: Callable[..., dict[str, Batches]]
    refresh: str
    repair: str | None
    loss: str | None
    tell: Callable[[str, int, int], None]
    bar: Any


@dataclass(frozen=True)
class _Done:
    """What was done: values for JSON, notes, and words that end the first sentence."""

    value: dict[str, Any]
    notes: Sequence[str] = ()
    unused: str = ""
    relabelling: Alignment | None = None


def merge(
    a: options.CheckpointA,
    b: options.CheckpointB,
    out: Annotated[
        Path, typer.Option(help="What to write: .safetensors, .pt or .pth; a folder for model folders.")
    ],
    model: options.OptionalModel = None,
    alignment: options.AlignmentFile = None,
    method: options.RelabelMethod = None,
    symmetry: options.RelabelSymmetry = None,
    weight: Annotated[float, typer.Option(min=0.0, max=1.0, help="Weight of B in the average.")] = 0.5,
    data: options.OptionalData = None,
    data_dir: options.DataDir = None,
    normalise: options.NormaliseChoice = None,
    shape: options.Shape = None,
    outputs: options.OutputNames = None,
    limit: options.ExampleLimit = 10_000,
    batch_size: options.BatchSize = None,
    refresh: options.RefreshChoice = "auto",
    repair: options.RepairChoice = None,
    loss: options.RepairLoss = None,
    max_shard_size: options.MaxShardSize = "5GB",
    trust_remote_code: options.TrustRemoteCode = False,
    seed: options.Seed = 0,
    json: options.Json = False,
    align: Annotated[str | None, typer.Option(metavar="METHOD", hidden=True)] = None,
) -> None:
    """Average two networks, after relabelling B if asked to, and write an ordinary checkpoint."""
    chosen = Relabel(
        alignment, align if method is None else method, shape, options.output_names(outputs), seed, symmetry
    )
    console.refuse_inputs({"--out": out}, [p for p in (a, b, alignment) if p is not None])
    if repair is not None:
        check_repair(repair)
    read = partial(data_for, data, data_dir, batch_size=batch_size, limit=limit, normalise=normalise)
    with console.progress() as bar:
        tell = console.stages(bar)
        tell("reading networks and data", 0, 2)
        wanted = _Wanted(a, b, out, weight, chosen, partial(read, bar=bar), refresh, repair, loss, tell, bar)
        if pretrained.are_adapters([a, b]):
            ignored = {"--model": model, "--alignment": alignment, "--data": data, "--repair": repair}
            done = _of_adapters(wanted, [k for k, v in ignored.items() if v])
        elif model is None and chosen.name is None and are_files(a, b) and data is None and repair is None:
            done = _of_files(wanted)
        elif folders.are_folders(a, b, model):
            done = _of_folders(wanted, max_shard_size, trust_remote_code)
        else:
            done = _of_networks(wanted, model, shape, trust_remote_code)
    value = {"out": str(out), "weight": weight, "align": chosen.name, "refresh": None, **done.value}
    how = f"after aligning by {chosen.name}" if chosen.name else "without alignment"
    told = [f"Merged A and B ({weight:g} of B) {how}; written to {out}{done.unused}"]
    if done.relabelling is not None and done.relabelling.larger:
        value |= {
            "symmetry": symmetry_text(done.relabelling.symmetry),
            "groups": told_groups(done.relabelling),
        }
        told += larger_moves(done.relabelling)
    console.emit(value, json, "\n".join(told + [f"Note: {note}" for note in done.notes]))


def _of_files(wanted: _Wanted) -> _Done:
    """Average checkpoints tensor by tensor."""
    check_format(wanted.out)
    shares = [1 - wanted.weight, wanted.weight]
    found = pretrained.merge_files([wanted.a, wanted.b], wanted.out, shares, on_progress=_moving(wanted.tell))
    return _Done({"tensors": found.tensors, "notes": list(found.notes)}, found.notes)


def _of_folders(wanted: _Wanted, max_shard_size: str, trust_remote_code: bool) -> _Done:
    """Average model folders, which are run only where that is needed."""
    folders.check_output(wanted.out, max_shard_size)
    data = wanted.read()
    batches = training_part(data)
    if wanted.refresh == "batchnorm" and batches is None:
        raise DataError(
            "--refresh batchnorm runs the network: give --data, on which statistics are recomputed."
        )
    pair = folders.open_pair(wanted.a, wanted.b, trust_remote_code, batches)
    anew = wanted.refresh != "none" and keeps_running_statistics(pair[0].model)
    if wanted.refresh == "batchnorm" and not anew:
        raise DataError(
            "--refresh batchnorm recomputes running statistics, and these networks have no BatchNorm that keeps any. "
            "Leave it out."
        )
    if data and not anew and wanted.repair is None and wanted.chosen.method in (None, "none", "weights"):
        warnings.warn(_UNUSED, IsthmusWarning, stacklevel=2)
    relabelling = wanted.chosen.of_folders(pair, batches, wanted.tell)
    written = folders.merge_folders(
        pair,
        wanted.out,
        weight=wanted.weight,
        alignment=relabelling,
        batches=batches if anew or wanted.repair is not None else None,
        repair=wanted.repair,
        loss=wanted.loss,
        max_shard_size=max_shard_size,
        bar=wanted.bar,
    )
    value = {"tensors": written.tensors, "unused": list(written.unknown)}
    if not written.repair:
        return _Done(value, (), folders.unused(written), relabelling)
    value["repair"] = written.repair
    return _Done(value, (written.repair,), folders.unused(written), relabelling)


def _of_networks(
    wanted: _Wanted, model: str | None, shape: list[str] | None, trust_remote_code: bool
) -> _Done:
    """Average checkpoints of a network that is built, relabelled and repaired if that is asked for."""
    check_format(wanted.out)
    data = wanted.read()
    with console.staged_files(wanted.out) as staged:
        networks = load_pair(wanted.a, wanted.b, model, trust_remote_code=trust_remote_code)
        batches, refresh = training_part(data), options.refresh_of(wanted.refresh)
        shown = wanted.repair not in (None, "none") and batches is None and not needs_data(wanted.repair)
        example = example_for(networks.target, data, shape) if shown else None
        relabelling = wanted.chosen.of(networks, data, wanted.tell)
        found = average(
            [networks.a, networks.b],
            [1 - wanted.weight, wanted.weight],
            alignments=[relabelling],
            batches=batches,
            args=None if example is None else example.args,
            kwargs=None if example is None else example.kwargs,
            refresh=refresh,
            repair=wanted.repair,
            loss=wanted.loss,
            model=networks.a,
        )
        save_state(staged[0], networks.as_stored(found.state))
    used = None if wanted.repair else chosen_refresh(refresh, networks.a, batches)
    value = {"tensors": len(found.state), "refresh": used, "notes": list(networks.notes)}
    if found.repair is None:
        return _Done(value, networks.notes, relabelling=relabelling)
    said = {"repair": found.repair.name, "repair_losses": dict(found.repair.losses)}
    return _Done(value | said, (*networks.notes, found.repair.words), relabelling=relabelling)


_WAYS: dict[str | None, pretrained.AdapterWay] = {None: "svd", "weights": "aligned", "none": "as they are"}
"""How adapters are averaged, by the method that the command was given."""


def _of_adapters(wanted: _Wanted, ignored: list[str]) -> _Done:
    """Average two adapters, which need no network.

    Raises:
        DataError: an option that is of no use for them.
    """
    method = wanted.chosen.method
    if ignored or method not in _WAYS:
        what = ignored[0] if ignored else f"--method {method}"
        raise DataError(
            f"{what}: adapters are averaged from their files alone: leave it out, which cuts the mean of the "
            "products to their rank, or give --method weights (factors rotated towards A's) or --method none (as they "
            "are)."
        )
    shares = [1 - wanted.weight, wanted.weight]
    found = pretrained.merge_adapters([wanted.a, wanted.b], wanted.out, shares, way=_WAYS[method])
    return _Done({"tensors": found.tensors, "way": found.way, "errors": dict(found.errors)}, (str(found),))


def _moving(tell: Callable[[str, int, int], None]) -> Callable[[str, int, int], None]:
    return lambda _, done, total: tell("merging", done, total)
