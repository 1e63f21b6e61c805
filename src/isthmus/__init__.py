"""Isthmus: linear mode connectivity modulo permutation.

Find the relabelling of one network's hidden units that brings it close to another, prove that it changes nothing,
measure the straight line between the two, and merge.

    >>> import torch, isthmus
    >>> a, b = (torch.nn.Sequential(torch.nn.Linear(4, 16), torch.nn.ReLU(), torch.nn.Linear(16, 3)) for _ in "ab")
    >>> alignment = isthmus.align(a, b, args=torch.zeros(1, 4), method="weights")
    >>> sorted(alignment.permutations["0"].tolist()) == list(range(16))
    True
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from isthmus.batches import Batch
    from isthmus.connectivity import Curve, Line, interpolate, line, line_along, loss_barrier
    from isthmus.errors import (
        CheckpointError,
        DataError,
        IsthmusError,
        MissingExtraError,
        ModelError,
        OutputError,
        ShapeError,
        SymmetryError,
        VerificationError,
    )
    from isthmus.explanation import Explanation, explain
    from isthmus.folding import Folded, fold
    from isthmus.matching import METHODS, Alignment, DimensionTable, align, dimension, match
    from isthmus.merging import merge
    from isthmus.paths import Path, Refreshed, Repaired, Straight
    from isthmus.refinement import refine
    from isthmus.symmetry import AxisGroup, SymmetrySpec, Verification, apply, discover, verify

__version__ = "0.1.0"

__all__ = [
    "discover",
    "SymmetrySpec",
    "AxisGroup",
    "apply",
    "verify",
    "Verification",
    "align",
    "match",
    "METHODS",
    "Alignment",
    "line",
    "line_along",
    "Line",
    "Curve",
    "Path",
    "Straight",
    "Refreshed",
    "Repaired",
    "interpolate",
    "loss_barrier",
    "merge",
    "explain",
    "Explanation",
    "refine",
    "fold",
    "Folded",
    "dimension",
    "DimensionTable",
    "Batch",
    "IsthmusError",
    "CheckpointError",
    "DataError",
    "MissingExtraError",
    "ModelError",
    "OutputError",
    "ShapeError",
    "SymmetryError",
    "VerificationError",
]

_HOMES = {
    "batches": ("Batch",),
    "connectivity": ("Curve", "Line", "interpolate", "line", "line_along", "loss_barrier"),
    "errors": (
        "CheckpointError",
        "DataError",
        "IsthmusError",
        "MissingExtraError",
        "ModelError",
        "OutputError",
        "ShapeError",
        "SymmetryError",
        "VerificationError",
    ),
    "explanation": ("Explanation", "explain"),
    "folding": ("Folded", "fold"),
    "matching": ("METHODS", "Alignment", "DimensionTable", "align", "dimension", "match"),
    "merging": ("merge",),
    "paths": ("Path", "Refreshed", "Repaired", "Straight"),
    "refinement": ("refine",),
    "symmetry": ("AxisGroup", "SymmetrySpec", "Verification", "apply", "discover", "verify"),
}
"""Where each public name lives. They are imported when first asked for: ``import isthmus`` is then quick, and the
command line is in charge (of an interruption, of a missing package) before torch is being imported."""


def __getattr__(name: str) -> Any:
    """Return a public name, or a part of the package, and remember it."""
    for home, names in _HOMES.items():
        if name in names:
            found = getattr(import_module(f"{__name__}.{home}"), name)
            globals()[name] = found
            return found
    if not name.startswith("_"):
        try:
            return import_module(f"{__name__}.{name}")
        except ModuleNotFoundError as error:
            if error.name != f"{__name__}.{name}":
                raise
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """Return the public names, imported or not."""
    return sorted({*globals(), *__all__})
