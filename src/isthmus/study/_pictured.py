"""What a report shows of the relabelling itself, as arrays: how alike units are, and what acts on them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from isthmus.couplings import Linear, Monomial, Permutation
from isthmus.matching import Alignment, Problem
from isthmus.moments import CrossMoment, CrossRequest, Frame, Tap, collected
from isthmus.states import state_of

__all__ = ["arrays_of", "described", "similarities", "similarity_request"]

_LARGEST_PICTURE = 1024
"""Groups with more units store no similarity matrix: their picture would not fit in a page."""


def similarity_request(problem: Problem) -> CrossRequest:
    """Return the request of what :func:`similarities` reads: each group where it is seen first."""
    return CrossRequest(_taps(problem), Frame(problem.spec, {}))


def similarities(
    found: Mapping[str, Sequence[CrossMoment]], name: str = "similarity"
) -> dict[str, np.ndarray]:
    """Return correlations of A's units with B's, by group; NaN for units that never vary.

    Rows that are units themselves are replaced by their mean: B lists them in another order.
    """
    arrays: dict[str, np.ndarray] = {}
    for group, moments in found.items():
        matrix: Tensor = moments[0].correlation.clone()
        constant_a, constant_b = moments[0].constant_units
        matrix[constant_a] = math.nan
        matrix[:, constant_b] = math.nan
        arrays[f"{name}/{group}"] = matrix.float().cpu().numpy()
    return arrays


def arrays_of(problem: Problem, name: str, found: Alignment) -> dict[str, np.ndarray]:
    """Return the arrays of an alignment: permutations, factors, spectra, and what no permutation shows.

    ``permutation/NAME/GROUP`` and ``factors/NAME/GROUP`` say where each unit comes from and what it is multiplied by;
    ``spectrum/NAME/GROUP`` are the singular values of an invertible map. ``after/NAME/GROUP`` are the correlations of
    A's units with those of B relabelled, for groups whose units are mixed, or come from another block of B.
    """
    arrays: dict[str, np.ndarray] = {}
    for group, coupling in found.couplings.items():
        if isinstance(coupling, Permutation | Monomial):
            arrays[f"permutation/{name}/{group}"] = coupling.index.numpy()
        if isinstance(coupling, Monomial):
            arrays[f"factors/{name}/{group}"] = coupling.factors.detach().cpu().numpy()
        if isinstance(coupling, Linear):
            arrays[f"spectrum/{name}/{group}"] = torch.linalg.svdvals(coupling.values.detach()).cpu().numpy()
    taps = {group: t for group, t in _taps(problem).items() if _unseen(found, group)}
    if taps:
        request, moved = (
            CrossRequest(taps, Frame(problem.spec, {})),
            found.apply(state_of(problem.model_b), check=False),
        )
        (moments,) = collected(problem.runner, problem.batches, [request], problem.state_a, moved)
        arrays |= similarities(moments, f"after/{name}")
    return arrays


def described(found: Alignment) -> dict[str, dict[str, Any]]:
    """Return what each group's coupling does to its units, as plain values and in words."""
    return {
        group: {
            **summary.to_dict(),
            "similarity": list(found.similarities[group]) if group in found.similarities else None,
            "text": found.describe(group),
        }
        for group, summary in found.summaries.items()
    }


def _unseen(found: Alignment, group: str) -> bool:
    """Return whether the similarities of B as it was do not show a group after it has moved."""
    outer = [found.couplings.get(name) for name, _ in found.spec.groups[group].within]
    from_elsewhere = any(isinstance(c, Permutation) and c.moves for c in outer)
    return from_elsewhere or not isinstance(found.couplings[group], Permutation | Monomial)


def _taps(problem: Problem) -> dict[str, list[Tap]]:
    """Return where each group's units are seen first, for the groups that are not too large for a picture."""
    layers = problem.layers
    return {
        g: listed[:1] for g, listed in layers.taps().items() if listed and layers.sizes[g] <= _LARGEST_PICTURE
    }
