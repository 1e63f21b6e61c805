"""The ``fold`` command: norms into the layers around them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from isthmus import pretrained
from isthmus.checkpoints import check_format, save_state
from isthmus.cli import _console as console
from isthmus.cli import _folders as folders
from isthmus.cli import _options as options
from isthmus.cli._pair import example_for, example_of_shapes, load_network
from isthmus.errors import DataError
from isthmus.folding import PARTS, Folded
from isthmus.folding import fold as fold_network
from isthmus.pretrained import FoldedModel

__all__ = ["fold"]


def fold(
    checkpoint: Annotated[
        Path,
        typer.Argument(
            metavar="CHECKPOINT",
            help="A model folder, or a checkpoint (.safetensors, .pt, .pth, .ckpt, .bin, FILE::KEY) with --model.",
        ),
    ],
    out: Annotated[
        Path, typer.Option(help="What to write: a folder for a model folder, else .safetensors, .pt or .pth.")
    ],
    model: Annotated[
        str | None,
        typer.Option(
            "--model", metavar="TARGET", help="`package.module:factory`, not needed for a model folder."
        ),
    ] = None,
    part: Annotated[
        list[str] | None,
        typer.Option(
            help=f"What to fold: {', '.join(f'`{p}`' for p in PARTS)}; repeat for several. Default all."
        ),
    ] = None,
    untie: Annotated[
        bool, typer.Option("--untie", help="Give a tied head a tensor of its own, if a fold needs that.")
    ] = False,
    shape: options.Shape = None,
    outputs: options.OutputNames = None,
    max_shard_size: options.MaxShardSize = "5GB",
    trust_remote_code: options.TrustRemoteCode = False,
    json: options.Json = False,
) -> None:
    """Fold gains, biases and means of norms, and BatchNorms, into the layers around them; the function stays."""
    console.refuse_inputs({"--out": out}, [checkpoint])
    settings: dict[str, Any] = {
        "outputs": options.output_names(outputs),
        "parts": tuple(part or PARTS),
        "untie": untie,
    }
    with console.progress() as bar:
        tell = console.stages(bar)
        tell("reading the network", 0, 1)
        if model is None and os.path.isdir(checkpoint):
            folders.check_output(out, max_shard_size)
            given = example_of_shapes(shape) if shape else None
            opened = pretrained.open_model(checkpoint, trust_remote_code=trust_remote_code, example=given)
            found = pretrained.fold(
                opened,
                out,
                max_shard_size=max_shard_size,
                on_progress=lambda *at: tell("folding", *at[1:]),
                **settings,
            )
            folds, refusals = found.plan.folds, found.plan.refusals
        else:
            found = _fold_file(checkpoint, out, model, trust_remote_code, shape, settings)
            folds, refusals = found.folds, found.refusals
    console.emit(_value(found, folds, refusals, out), json, f"{found}\nWritten to {out}")


def _fold_file(
    checkpoint: Path,
    out: Path,
    model: str | None,
    trust_remote_code: bool,
    shape: list[str] | None,
    settings: dict[str, Any],
) -> Folded:
    """Fold a checkpoint of a network that is built in code.

    Raises:
        DataError: there is no TARGET.
    """
    if model is None:
        raise DataError(
            f"{checkpoint}: is a file, which does not say what it computes. Give --model package.module:factory, or a "
            "model folder."
        )
    check_format(out)
    with console.staged_files(out) as staged:
        network = load_network(checkpoint, model, trust_remote_code=trust_remote_code)
        example = example_for(network.target, {}, shape)
        found = fold_network(network.model, example.args, example.kwargs, **settings)
        save_state(staged[0], network.as_stored(found.state))
    return found


def _value(found: Folded | FoldedModel, folds: Any, refusals: Any, out: Path) -> dict[str, Any]:
    """Return what a machine reads."""
    return {
        "out": str(out),
        "folds": [{"name": f.name, "into": list(f.into), "text": str(f)} for f in folds],
        "refusals": [{"name": r.name, "what": r.what, "why": r.why} for r in refusals],
        "untied": list(found.untied),
        "folded_gains": list(found.folded_gains),
        "folded_biases": list(found.folded_biases),
        "centred": list(found.centred),
        "error": found.proof.largest,
        "tolerance": found.proof.tolerance,
        "change": found.change,
    }
