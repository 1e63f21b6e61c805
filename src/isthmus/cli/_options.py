"""Arguments and options that several commands share: one name, one meaning, one help text each."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from isthmus.errors import DataError
from isthmus.matching import METHODS, symmetry_named
from isthmus.paths import REPAIRS

__all__ = [
    "DATA_HELP",
    "METHODS_HELP",
    "AlignmentFile",
    "BatchSize",
    "CheckpointA",
    "CheckpointB",
    "DataDir",
    "Json",
    "ExampleLimit",
    "MaxShardSize",
    "NormaliseChoice",
    "OptionalData",
    "OptionalMethod",
    "OptionalModel",
    "OutputNames",
    "RefreshChoice",
    "RelabelMethod",
    "RelabelSymmetry",
    "RepairChoice",
    "RepairLoss",
    "Seed",
    "Shape",
    "SymmetryChoice",
    "TrustRemoteCode",
    "Verbose",
    "output_names",
    "refresh_of",
    "symmetry_of",
]

DATA_HELP = "`digits`, `mnist`, `fashion-mnist`, `cifar10`, `cifar100`, or `package.module:function` returning batches."
METHODS_HELP = ", ".join(f"`{name}`" for name in METHODS) + ", or your own as `module:METHOD`"

CheckpointA = Annotated[
    Path,
    typer.Argument(
        metavar="A",
        help="Checkpoint of A: .safetensors, .pt, .pth, .ckpt, .bin, FILE::KEY, or a model folder.",
    ),
]
CheckpointB = Annotated[Path, typer.Argument(metavar="B", help="Checkpoint of B, which moves towards A.")]
OptionalModel = Annotated[
    str | None,
    typer.Option(
        "--model",
        metavar="TARGET",
        help="`package.module:factory`, or a model folder; not needed where A and B are model folders.",
    ),
]
OptionalMethod = Annotated[
    str | None,
    typer.Option(
        metavar="METHOD",
        help=f"{METHODS_HELP}. Default `covariance` with data, `weights` without.",
    ),
]
SymmetryChoice = Annotated[
    str,
    typer.Option(
        metavar="CLASSES",
        help="What may act on the units: `permutations`, `all` that the network allows, or the largest classes wanted, "
        "such as `signed,positive`.",
    ),
]
RelabelMethod = Annotated[
    str | None, typer.Option(metavar="METHOD", help=f"Relabel B first, by {METHODS_HELP}.")
]
AlignmentFile = Annotated[
    Path | None, typer.Option(help="Relabel B as an alignment file of `isthmus align` says.")
]
OptionalData = Annotated[str | None, typer.Option(help=DATA_HELP)]
DataDir = Annotated[
    Path | None, typer.Option(help="Folder that holds the data set; nothing is downloaded then.")
]
Shape = Annotated[
    list[str] | None,
    typer.Option(help="Shape of an example input such as `1,3,32,32`; repeat for several inputs."),
]
ExampleLimit = Annotated[
    int | None,
    typer.Option(
        min=1, help="Use only so many examples: of a named data set drawn at random, of your own the first."
    ),
]
BatchSize = Annotated[
    int | None, typer.Option(min=1, help="Examples per batch. Default: yours as they come, else 500.")
]
NormaliseChoice = Annotated[
    str | None,
    typer.Option(
        "--normalise",
        help="What inputs of a named data set, which come in [0, 1], are normalised by: `train` (mean and deviation of "
        "the training set), `imagenet`, `symmetric` (to [-1, 1]), or MEAN/STD such as `0.1307/0.3081`.",
    ),
]
OutputNames = Annotated[
    list[str] | None,
    typer.Option(
        "--outputs", help="Output to preserve, by name or position; repeat for several. Default all."
    ),
]
RefreshChoice = Annotated[
    str,
    typer.Option(
        "--refresh",
        help="BatchNorm statistics on the way: `auto` recomputes them where there are some and data, `batchnorm` "
        "insists, `none` leaves them.",
    ),
]
RelabelSymmetry = Annotated[
    str | None,
    typer.Option(
        "--symmetry",
        metavar="CLASSES",
        help="By what --method matches: `permutations` (default), `all` that the network allows, or classes such as "
        "`signed,positive`.",
    ),
]
RepairChoice = Annotated[
    str | None,
    typer.Option(
        "--repair",
        metavar="REPAIR",
        help=f"Instead of a refresh: {', '.join(f'`{name}`' for name in REPAIRS)}, `temperature`, any of them with "
        "`+temperature`, or `auto`: the one with the lowest loss on the training data.",
    ),
]
RepairLoss = Annotated[
    str | None,
    typer.Option(
        "--loss",
        help="For `--repair`: `cross_entropy`, `mse`, `bce` or `model`: the network's own. Default: the network's own "
        "for model folders, else cross-entropy.",
    ),
]
MaxShardSize = Annotated[
    str, typer.Option(help="Largest weight file of a model folder that is written, such as `5GB` or `500MB`.")
]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run code that lies in a model folder, if it needs it.")
]
Seed = Annotated[int, typer.Option(help="Of everything random.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output, for machines.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Print every group and every pinned axis.")]


def symmetry_of(given: str) -> str | tuple[str, ...]:
    """Return what may act on units, as :func:`isthmus.align` takes it.

    Raises:
        DataError: an unknown class.
    """
    return symmetry_named(given)


def output_names(given: list[str] | None) -> list[str | int] | None:
    """Return the outputs chosen on the command line: whole numbers are positions, the rest names.

    Raises:
        DataError: an empty name.
    """
    if not given:
        return None
    if "" in given:
        raise DataError("--outputs '': expected the name or the position of an output, such as logits or 0.")
    return [int(o) if o.lstrip("-").isdigit() else o for o in given]


def refresh_of(choice: str) -> str | None:
    """Return what the library calls a choice of ``--refresh``.

    Raises:
        DataError: an unknown choice.
    """
    if choice not in ("auto", "batchnorm", "none"):
        raise DataError(f"--refresh {choice}: expected auto, batchnorm or none.")
    return None if choice == "none" else choice
