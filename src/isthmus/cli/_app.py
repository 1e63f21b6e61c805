"""The commands."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from isthmus import __version__
from isthmus.checkpoints import check_format
from isthmus.cli import _console as console
from isthmus.cli._pair import align_pair, data_for, example_for, example_of_shapes, load_pair
from isthmus.cli._study import study
from isthmus.cli._target import load_target
from isthmus.cli._theory import theory
from isthmus.errors import DataError, IsthmusError, VerificationError
from isthmus.files import atomic_folder, atomic_path

__all__ = ["app", "run"]

app = typer.Typer(
    name="isthmus",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    help="""Linear mode connectivity modulo permutation.

Two networks trained from different seeds look unrelated. Isthmus finds the relabelling of one network's hidden units
that brings it close to the other, proves that it changes nothing, measures the straight line between them, and merges.

Start with `isthmus demo`. For your own networks write a function that builds the module, and call its place TARGET:
`package.module:factory`.""",
)


def _tell_version(wanted: bool) -> None:
    if wanted:
        console.out().print(f"isthmus {__version__}", highlight=False)
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_tell_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Take the options that belong to no command."""


app.add_typer(study)

app.add_typer(theory, name="theory")

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output, for machines.")]
Model = Annotated[
    str, typer.Option("--model", metavar="TARGET", help="`package.module:factory` that builds the network.")
]
OptionalModel = Annotated[
    str | None,
    typer.Option(
        "--model",
        metavar="TARGET",
        help="`package.module:factory`, or a model folder; not needed where A and B are model folders.",
    ),
]
CheckpointA = Annotated[
    Path,
    typer.Argument(
        metavar="A", help="Checkpoint of A: .safetensors, .pt, .pth, or a Hugging Face model folder."
    ),
]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run code that lies in a model folder, if it needs it.")
]
MaxShardSize = Annotated[
    str, typer.Option(help="Largest weight file of a model folder that is written, such as `5GB` or `500MB`.")
]
CheckpointB = Annotated[Path, typer.Argument(metavar="B", help="Checkpoint of B, which moves towards A.")]
DataDir = Annotated[
    Path | None, typer.Option(help="Folder that holds the data set; nothing is downloaded then.")
]
Shape = Annotated[
    list[str] | None,
    typer.Option(help="Shape of an example input such as `1,3,32,32`; repeat for several inputs."),
]
Limit = Annotated[int | None, typer.Option(min=1, help="Use only so many examples, drawn at random.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Examples per batch.")]
Seed = Annotated[int, typer.Option(help="Of everything random.")]
_DATA = "`digits`, `mnist`, `fashion-mnist`, `cifar10`, `cifar100`, or `package.module:function` returning batches."
_METHODS = "`weights-incoming`, `weights`, `covariance`, `activations` or `correlation`."


@app.command()
def demo(
    data: Annotated[
        str, typer.Option(help="`digits` (embedded), `mnist`, `fashion-mnist`, `cifar10`, …")
    ] = "digits",
    data_dir: DataDir = None,
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
    seed: Seed = 0,
    out: Annotated[
        Path, typer.Option(help="Folder for report.html, figures, result.json and checkpoints.")
    ] = Path("isthmus-demo"),
    json: Json = False,
) -> None:
    """Train two networks, align them by every method, and write a report.

    The networks differ in their initial values and in the order of the data. With the default settings nothing is
    downloaded and the whole run takes less than a minute.
    """
    from isthmus.cli._demo import write_demo
    from isthmus.study import DemoSettings

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
    )
    record, paths = write_demo(
        settings, data_dir, out, threads=1 if threads is None and data == "digits" else threads
    )
    console.emit(record, json, console.method_table(record))
    if not json:
        console.out().print(f"\nReport: {paths['report']}", highlight=False, soft_wrap=True)


@app.command()
def symmetry(
    target: Annotated[
        str,
        typer.Argument(
            metavar="TARGET",
            help="`package.module:factory` (a module, or module and example inputs), or a model folder.",
        ),
    ],
    shape: Shape = None,
    outputs: Annotated[
        list[str] | None, typer.Option(help="Outputs to preserve, by name or position; default all.")
    ] = None,
    save: Annotated[Path | None, typer.Option(help="Write the spec as JSON.")] = None,
    trust_remote_code: TrustRemoteCode = False,
    seed: Seed = 0,
    json: Json = False,
) -> None:
    """Show which units of a network can be relabelled, what is pinned and why, and verify it by running."""
    from isthmus import pretrained
    from isthmus.pretrained import is_model_folder
    from isthmus.symmetry import discover, verify

    wanted = [int(o) if o.lstrip("-").isdigit() else o for o in outputs] if outputs else None
    with console.progress() as bar:
        tell = console.stages(bar)
        tell("building the network", 0, 3)
        if is_model_folder(target):
            given = example_of_shapes(shape) if shape else None
            opened = pretrained.open_model(target, trust_remote_code=trust_remote_code, example=given)
            tell("discovering symmetries", 1, 3)
            spec = opened.discover(wanted)
            tell("verifying by running", 2, 3)
            result = pretrained.verify(spec, opened, seed=seed)
        else:
            found = load_target(target)
            example = example_for(found, {}, shape)
            tell("discovering symmetries", 1, 3)
            spec = discover(found.model, example.args, example.kwargs, outputs=wanted)
            tell("verifying by running", 2, 3)
            generator = torch.Generator().manual_seed(seed)
            result = verify(
                spec, found.model, example.args, example.kwargs, outputs=wanted, generator=generator
            )
    if save is not None:
        with atomic_path(save) as temporary:
            temporary.write_text(spec.to_json(), encoding="utf-8")
    import json as json_module

    value = {
        **json_module.loads(spec.to_json()),
        "fraction_moved": spec.fraction_moved,
        "verification": {
            "passed": result.passed,
            "max_relative_error": result.max_relative_error,
            "tolerance": result.tolerance,
            "draws": result.draws,
            "guilty": list(result.guilty),
        },
    }
    console.emit(value, json, f"{spec}\n\n{result}")
    result.require()


@app.command()
def align(
    a: CheckpointA,
    b: CheckpointB,
    out: Annotated[Path, typer.Option(help="The alignment file (.safetensors) to write.")],
    model: OptionalModel = None,
    method: Annotated[str, typer.Option(help=_METHODS)] = "weights",
    data: Annotated[str | None, typer.Option(help=_DATA)] = None,
    data_dir: DataDir = None,
    shape: Shape = None,
    limit: Limit = 10_000,
    batch_size: BatchSize = 500,
    apply: Annotated[
        Path | None, typer.Option(help="Also write B relabelled, as a checkpoint or model folder.")
    ] = None,
    max_shard_size: MaxShardSize = "5GB",
    trust_remote_code: TrustRemoteCode = False,
    seed: Seed = 0,
    json: Json = False,
) -> None:
    """Find the relabelling of B that brings it close to A, and write it to a file."""
    from isthmus.checkpoints import save_state
    from isthmus.cli import _folders as folders
    from isthmus.states import state_of

    in_folders = folders.are_folders(a, b, model)
    in_folders = folders.are_folders(a, b, model)
    if in_folders:
        folders.check_output(apply, max_shard_size)
    written = None
    with (
        console.staged_files(out, None if in_folders else apply) as staged,
        console.progress() as bar,
    ):
        tell = console.stages(bar)
        tell("reading data", 0, 2)
        found = data_for(
            data, data_dir, batch_size=batch_size, limit=limit, on_progress=console.downloads(bar)
        )
        batches = found.get("train", next(iter(found.values()), None))
        tell(f"aligning by {method}", 1, 2)
        if in_folders:
            first, second = folders.open_pair(a, b, trust_remote_code, batches)
            alignment = folders.align_folders(first, second, method=method, batches=batches, seed=seed)
            alignment.save(staged[0])
            if apply is not None:
                written = folders.relabel_folder(alignment, second, apply, max_shard_size, bar)
        else:
            pair = load_pair(a, b, model, trust_remote_code=trust_remote_code)
            alignment = align_pair(pair, found, method=method, batches=batches, shapes=shape, seed=seed)
            alignment.save(staged[0])
            if apply is not None:
                save_state(staged[1], alignment.apply(state_of(pair.b)))
    value = {
        "method": method,
        "status": alignment.status,
        "moved": alignment.moved,
        "costs": {g: list(c) for g, c in alignment.costs.items()},
        "sweeps": list(alignment.sweeps),
        "notes": list(alignment.notes),
        "verification_error": alignment.verification_error,
        "out": str(out),
        "unused": [] if written is None else list(written.unknown),
    }
    console.emit(value, json, _alignment_text(alignment, out, apply) + folders.unused(written))


@app.command()
def line(
    a: CheckpointA,
    b: CheckpointB,
    data: Annotated[str, typer.Option(help=_DATA)],
    out: Annotated[Path, typer.Option(help="Folder for line.json and line.png.")],
    model: OptionalModel = None,
    alignment: Annotated[Path | None, typer.Option(help="Alignment file made by `isthmus align`.")] = None,
    data_dir: DataDir = None,
    limit: Limit = None,
    batch_size: BatchSize = 1000,
    points: Annotated[int, typer.Option(min=2, help="Positions on the line.")] = 11,
    loss: Annotated[str, typer.Option(help="`cross_entropy` or `mse`.")] = "cross_entropy",
    refresh: Annotated[
        str | None, typer.Option(help="`batchnorm`: recompute running statistics on the way.")
    ] = None,
    trust_remote_code: TrustRemoteCode = False,
    seed: Seed = 0,
    json: Json = False,
) -> None:
    """Measure loss and accuracy on the straight line from A to B (or to B relabelled)."""
    from isthmus.cli._line import write_line

    with atomic_folder(out) as folder, console.progress() as bar:
        tell = console.stages(bar)
        tell("reading networks and data", 0, 2)
        pair = load_pair(a, b, model, trust_remote_code=trust_remote_code)
        found = data_for(
            data, data_dir, batch_size=batch_size, limit=limit, on_progress=console.downloads(bar)
        )
        generator = torch.Generator().manual_seed(seed)
        tell("measuring the line", 1, 2)
        measured = write_line(
            pair, found, folder, alignment, points=points, loss=loss, refresh=refresh, generator=generator
        )
    console.emit(measured.to_dict(), json, f"{measured}\n\nWritten to {out}")


@app.command()
def merge(
    a: CheckpointA,
    b: CheckpointB,
    out: Annotated[
        Path, typer.Option(help="What to write: .safetensors, .pt or .pth; a folder for model folders.")
    ],
    model: OptionalModel = None,
    align: Annotated[str | None, typer.Option(metavar="METHOD", help=f"Relabel B first: {_METHODS}")] = None,
    weight: Annotated[float, typer.Option(min=0.0, max=1.0, help="Weight of B in the average.")] = 0.5,
    data: Annotated[str | None, typer.Option(help=_DATA)] = None,
    data_dir: DataDir = None,
    shape: Shape = None,
    limit: Limit = 10_000,
    batch_size: BatchSize = 500,
    refresh: Annotated[
        str | None, typer.Option(help="`batchnorm`: recompute running statistics on the data.")
    ] = None,
    max_shard_size: MaxShardSize = "5GB",
    trust_remote_code: TrustRemoteCode = False,
    seed: Seed = 0,
    json: Json = False,
) -> None:
    """Average two networks, after relabelling B if asked to, and write an ordinary checkpoint."""
    from isthmus.cli import _folders as folders
    from isthmus.cli._merge import merge_checkpoints

    in_folders = folders.are_folders(a, b, model)
    if in_folders:
        folders.check_output(out, max_shard_size)
    else:
        check_format(out)
    with console.progress() as bar:
        found = data_for(
            data, data_dir, batch_size=batch_size, limit=limit, on_progress=console.downloads(bar)
        )
    batches = found.get("train", next(iter(found.values()), None))
    how = f"after aligning by {align}" if align else "without alignment"
    told = f"Merged {a} and {b} (weight of B {weight:g}, {how}) into {out}"
    if in_folders:
        if refresh is not None:
            raise DataError("--refresh runs the network; model folders are merged without loading it.")
        with console.progress() as bar:
            first, second = folders.open_pair(a, b, trust_remote_code, batches)
            found_alignment = (
                folders.align_folders(first, second, method=align, batches=batches, seed=seed)
                if align
                else None
            )
            written = folders.merge_folders(
                first,
                second,
                out,
                weight=weight,
                alignment=found_alignment,
                max_shard_size=max_shard_size,
                bar=bar,
            )
        value = {"out": str(out), "weight": weight, "align": align, "refresh": None}
        value |= {"tensors": written.tensors, "unused": list(written.unknown)}
        console.emit(value, json, told + folders.unused(written))
        return
    pair = load_pair(a, b, model, trust_remote_code=trust_remote_code)
    tensors = merge_checkpoints(
        pair,
        out,
        found,
        method=align,
        weight=weight,
        batches=batches,
        refresh=refresh,
        shapes=shape,
        seed=seed,
    )
    value = {"out": str(out), "weight": weight, "align": align, "refresh": refresh, "tensors": tensors}
    console.emit(value, json, told)


def _alignment_text(alignment: Any, out: Path, applied: Path | None) -> str:
    lines = [str(alignment)]
    width = max((len(g) for g in alignment.permutations), default=5)
    for group, (before, after) in alignment.costs.items():
        moved = alignment.moved[group]
        lines.append(f"  {group:<{width}}  {moved:6.1%} moved, matched cost {before:.4g} → {after:.4g}")
    lines += [f"  note: {n}" for n in alignment.notes]
    lines.append(f"Written to {out}" + (f", B relabelled to {applied}" if applied else ""))
    return "\n".join(lines)


# The base of all usage errors; Typer brings its own copy of Click in new versions and exports only subclasses.
_USAGE_ERROR: Any = next(c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException")


def run(arguments: Sequence[str]) -> int:
    """Run a command and return its exit code; errors are printed as one message, without a traceback."""
    command = typer.main.get_command(app)
    console.quiet_torch()
    try:
        result = command.main(args=list(arguments), prog_name="isthmus", standalone_mode=False)
    except _USAGE_ERROR as error:
        error.show()
        return console.BAD_USE
    except (KeyboardInterrupt, typer.Abort):
        result = console.INTERRUPTED
    except VerificationError as error:
        sys.stderr.write(f"Check failed: {error}\n")
        return console.CHECK_FAILED
    except IsthmusError as error:
        sys.stderr.write(f"Error: {error}\n")
        return console.BAD_USE
    if result == console.INTERRUPTED:
        sys.stderr.write("Interrupted; nothing was written.\n")
    return result if isinstance(result, int) else 0
