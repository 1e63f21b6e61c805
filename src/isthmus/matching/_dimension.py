r"""Approximate dimension of what each method matches, per group: :func:`dimension`.

A method that finds partners among few directions finds good ones. For a group of ``m`` units let ``S``, shape
``(m, m)``, be the Gram matrix of the units as a method sees them, i.e. the gain matrix of the network against
itself. Then :math:`\mathrm{Dim}(S) = \mathrm{tr}(S)^2 / \mathrm{tr}(S^2)`, between 1 and the rank.

====================  ============================================  ===================================
method                ``S``                                         centred
====================  ============================================  ===================================
``weights-incoming``  ``W Wᵀ``                                      minus the mean unit
``weights``           ``W Wᵀ + b bᵀ + W₊ᵀ W₊``                      minus the mean unit
``covariance``        ``[W b] E[(h, 1)(h, 1)ᵀ] [W b]ᵀ = E[z zᵀ]``   ``Cov(z) = W Cov(h) Wᵀ``
``activations``       ``E[φ φᵀ]``                                   ``Cov(φ)``
``correlation``       cosines ``E[φᵢ φⱼ] / √(E[φᵢ²] E[φⱼ²])``       correlations
====================  ============================================  ===================================

The uncentred values are the paper's; on activations they mostly measure the mean direction (Theory, section 8).
A group that several layers compute or read has the sum of their ``S`` (features concatenated); of activations
seen in several places, the mean. Where a layer's ``S`` is not the whole story (embeddings, gains of norms), the
other parameters are added as the method adds them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from isthmus.batches import Batches
from isthmus.matching._objectives import Objective
from isthmus.matching._problem import Problem
from isthmus.matching._terms import (
    LayeredPair,
    incoming_weight_objective,
    layer_terms,
    uncovered_terms,
    weight_objective,
)
from isthmus.moments import InputRequest, InputStatistics, Moment, Request, UnitRequest
from isthmus.symmetry import Outputs, SymmetrySpec
from isthmus.transport import approximate_dimension_of_moment, ranks_of_moment

__all__ = ["Dimension", "DimensionTable", "dimension", "dimensions_of", "dimensions_of_both"]


@dataclass(frozen=True)
class Dimension:
    """Number of directions that the units of one group fill, as one method sees them; no unit, NaN for a zero matrix.

    Attributes:
        uncentred: approximate dimension of ``S``.
        centred: the same after centring (see the module).
        stable_rank: ``tr(S) / λ_max(S)``; NaN if not asked for.
        entropy_rank: exponential of the entropy of the normalised eigenvalues of ``S``; NaN if not asked for.
    """

    uncentred: float
    centred: float
    stable_rank: float
    entropy_rank: float


@dataclass(frozen=True)
class DimensionTable:
    """Dimensions by method and group.

    Attributes:
        methods: from method to group name to :class:`Dimension`.
        sizes: units per group: the largest value a dimension can take.
    """

    methods: Mapping[str, Mapping[str, Dimension]]
    sizes: Mapping[str, int]

    def __repr__(self) -> str:
        """Return one line."""
        return f"DimensionTable(groups={len(self.sizes)}, methods={list(self.methods)})"

    def to_dict(self) -> dict[str, dict[str, dict[str, float | None]]]:
        """Return plain values by method, group and kind; ``None`` stands for NaN."""
        return {
            method: {
                group: {kind: value if math.isfinite(value) else None for kind, value in vars(found).items()}
                for group, found in groups.items()
            }
            for method, groups in self.methods.items()
        }

    def __str__(self) -> str:
        """Return one line per group, one pair of columns (uncentred, centred) per method."""
        width = max([5, *(len(name) for name in self.sizes)])
        wide = {method: max(len(method), 15) for method in self.methods}
        head = f"{'group':<{width}}  units  " + "  ".join(f"{m:>{w}}" for m, w in wide.items())
        lines = ["approximate dimension, uncentred / centred", head.rstrip()]
        for group, size in self.sizes.items():
            cells = []
            for method, w in wide.items():
                found = self.methods[method][group]
                cells.append(f"{found.uncentred:.1f} / {found.centred:.1f}".rjust(w))
            lines.append(f"{group:<{width}}  {size:>5}  {'  '.join(cells)}".rstrip())
        return "\n".join(lines)


def dimension(
    model: nn.Module,
    batches: Batches | None = None,
    *,
    args: Any = None,
    kwargs: Mapping[str, Any] | None = None,
    spec: SymmetrySpec | None = None,
    outputs: Outputs = None,
    ranks: bool = True,
    seed: int = 0,
) -> DimensionTable:
    r"""Measure, per group of units and per method, how many directions the matched units fill.

    Args:
        model: the network, in evaluation mode; not mutated.
        batches: data (see :mod:`isthmus.batches`); without any, only the methods that compare weights appear.
        args: example positional inputs for tracing; default: the start of the first batch.
        kwargs: example keyword inputs.
        spec: the symmetries; default: discovered.
        outputs: outputs that must be preserved (see :func:`isthmus.discover`).
        ranks: whether stable and entropy rank are measured too; they take the eigenvalues of every ``S``, minutes for
            a group of several thousand units. If not, they are NaN.
        seed: of the sampling of wide rows.

    Returns:
        A table over the groups of the spec. Compare it between networks of one width only.

    Raises:
        DataError: neither data nor example inputs.
        ModelError: the model is in training mode, or cannot be traced.
        CheckpointError: NaN or infinite weights.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2)).eval()
        >>> sorted(dimension(model, args=torch.zeros(1, 4)).methods)
        ['weights', 'weights-incoming']

    Source:
        Ferbach et al. 2024, section 6 (approximate dimension of the three methods); centring is ours.
    """
    problem = Problem(model, batches=batches, args=args, kwargs=kwargs, spec=spec, outputs=outputs, seed=seed)
    return dimensions_of(problem, ranks=ranks)


def dimensions_of(problem: Problem, *, ranks: bool = True) -> DimensionTable:
    """Return the dimensions of a problem's network A (see :func:`dimension`).

    Args:
        problem: the network and data; what was collected before is not collected again.
        ranks: whether stable and entropy rank are measured too.
    """
    if problem.data is None:
        return _table(problem, problem.state_a, None, ranks)
    problem.prepare(inputs=True, units=True)
    seen = problem.input_statistics(problem.generator()), problem.unit_moments()
    return _table(problem, problem.state_a, seen, ranks)


def dimensions_of_both(
    problem: Problem, *, ranks: bool = True, **more: Request
) -> tuple[DimensionTable, DimensionTable, dict[str, Any]]:
    """Return the dimensions of both networks of a problem with data, from one pass that serves the methods too.

    Args:
        problem: the networks and data.
        ranks: whether stable and entropy rank are measured too.
        more: further requests, as for :meth:`Problem.prepare`, and their results are returned last.
    """
    inputs = InputRequest(problem.runner.sites, problem.generator(), of_b=True)
    units = UnitRequest(problem.layers.taps(), of_b=True)
    of_b_too: dict[str, Any] = {"inputs_b": inputs, "units_b": units, **more}
    found = problem.prepare(inputs=True, joint=True, units=True, **of_b_too)
    of_b = _table(problem, problem.state_b, (found.pop("inputs_b"), found.pop("units_b")), ranks)
    return dimensions_of(problem, ranks=ranks), of_b, found


_Statistics = tuple[Mapping[str, InputStatistics], Mapping[str, Sequence[Moment]]]


def _table(
    problem: Problem, state: Mapping[str, Tensor], seen: _Statistics | None, ranks: bool
) -> DimensionTable:
    pair = LayeredPair(problem.layers, state, state)
    methods = {
        "weights-incoming": _of_weights(incoming_weight_objective(pair), ranks),
        "weights": _of_weights(weight_objective(pair), ranks),
    }
    if seen is not None:
        methods["covariance"] = _of_layers(pair, seen[0], ranks)
        methods["activations"], methods["correlation"] = _of_activations(seen[1], methods["weights"], ranks)
    return DimensionTable(
        {method: {name: groups[name] for name in problem.spec.groups} for method, groups in methods.items()},
        {name: group.size for name, group in problem.spec.groups.items()},
    )


def _of_weights(objective: Objective, ranks: bool) -> dict[str, Dimension]:
    return {name: _measured(gram, _centred(gram), ranks) for name, gram in _grams(objective)}


def _of_layers(
    pair: LayeredPair, statistics: Mapping[str, InputStatistics], ranks: bool
) -> dict[str, Dimension]:
    plain, centred = (
        dict(
            _grams(
                pair.objective(
                    [
                        term
                        for site in pair.layers.sites
                        for term in layer_terms(pair, site, statistics[site.name], centred=center)
                    ]
                )
            )
        )
        for center in (False, True)
    )
    rest = dict(_grams(pair.objective(uncovered_terms(pair))))
    return {
        name: _measured(plain[name] + rest[name], centred[name] + _centred(rest[name]), ranks)
        for name in plain
    }


def _of_activations(
    moments: Mapping[str, Sequence[Moment]], unseen: Mapping[str, Dimension], ranks: bool
) -> tuple[dict[str, Dimension], dict[str, Dimension]]:
    """Return the dimensions for ``activations`` and for ``correlation``; groups seen nowhere are ``unseen``."""
    plain, scaled = dict(unseen), dict(unseen)
    for name, seen in moments.items():
        if seen:
            plain[name] = _measured(
                torch.stack([m.second_moment for m in seen]).mean(0),
                torch.stack([m.covariance for m in seen]).mean(0),
                ranks,
            )
            scaled[name] = _measured(
                torch.stack([_cosines(m.second_moment) for m in seen]).mean(0),
                torch.stack([m.correlation for m in seen]).mean(0),
                ranks,
            )
    return plain, scaled


def _cosines(second_moment: Tensor) -> Tensor:
    """Return second moments of units scaled to a mean square of one; a unit that is always zero stays zero."""
    scale = second_moment.diagonal().clamp(min=0.0).sqrt()
    inverse = torch.where(scale > 0, 1 / scale, 0.0)
    return inverse[:, None] * second_moment * inverse


def _grams(objective: Objective) -> Iterator[tuple[str, Tensor]]:
    """Yield, per group, the gain of the network's units against themselves, shape ``(size, size)``."""
    for cluster in objective.structure.clusters:
        gains = objective.gains(cluster, {})
        for name in cluster:
            own = [g.reduced(name) for g in gains if name in g.members]
            yield name, torch.stack(own).sum(0)


def _centred(gram: Tensor) -> Tensor:
    """Return the Gram matrix after subtracting the mean unit from every unit."""
    mean = gram.mean(0)
    return gram - mean[:, None] - mean[None, :] + mean.mean()


def _measured(second_moment: Tensor, centred: Tensor, ranks: bool) -> Dimension:
    second_moment, centred = (0.5 * (s + s.T) for s in (second_moment, centred))
    # Rounding of a matrix that is zero after centring is no direction.
    tiny = 1e-13 * float(second_moment.abs().max()) if second_moment.numel() else 0.0
    if not second_moment.numel():
        return Dimension(math.nan, math.nan, math.nan, math.nan)
    return Dimension(
        approximate_dimension_of_moment(second_moment),
        approximate_dimension_of_moment(torch.where(centred.abs() <= tiny, 0.0, centred)),
        *(ranks_of_moment(second_moment) if ranks else (math.nan, math.nan)),
    )
