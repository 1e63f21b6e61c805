"""``align``: from two networks and, where a method needs them, data to the relabelling of B."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from isthmus.batches import Batches
from isthmus.couplings import Coupling, Permutation
from isthmus.errors import DataError
from isthmus.matching._alignment import Alignment
from isthmus.matching._classes import Symmetry, gains_in_the_way
from isthmus.matching._closeness import weight_similarities
from isthmus.matching._constant import CONSTANT_UNITS
from isthmus.matching._methods import METHODS, Method, method_named, tied
from isthmus.matching._objectives import Objective
from isthmus.matching._problem import Problem, no_data
from isthmus.matching._schedules import Schedule
from isthmus.states import digest_of
from isthmus.symmetry import AxisGroup, Couplings, Outputs, SymmetrySpec

__all__ = ["OnStage", "align", "silent", "solve"]

OnStage = Callable[[str, int, int], None]
"""Called with the name of a stage, and how many of how many are done."""


def align(
    model_a: nn.Module,
    model_b: nn.Module | Mapping[str, Tensor],
    *,
    batches: Batches | None = None,
    method: str | Method | None = None,
    args: Any = None,
    kwargs: Mapping[str, Any] | None = None,
    spec: SymmetrySpec | None = None,
    outputs: Outputs = None,
    schedule: Schedule | None = None,
    tie_outgoing: bool = False,
    symmetry: Symmetry | None = None,
    check: bool = True,
    seed: int = 0,
    on_stage: OnStage | None = None,
) -> Alignment:
    r"""Find the relabelling of B's hidden units that brings B close to A.

    ``match = objective × coupling solver × schedule``: the method names the objective and its usual schedule, the
    solver is exact linear assignment, or for larger classes of symmetries that of each group's class.

    Args:
        model_a: network A, in evaluation mode; not mutated.
        model_b: network B, or its state; not mutated.
        batches: data (see :mod:`isthmus.batches`); needed by ``covariance`` (one pass of A), ``activations`` and
            ``correlation`` (one pass of both). Shuffled examples, not sorted by class.
        method: a name in :data:`METHODS`, ``"module:METHOD"`` for your own, or a :class:`Method`;
            default: ``"covariance"`` with ``batches``, ``"weights"`` without. A name may go on with what may act on
            units and how factors are found, such as ``"weights+norms"`` (see :func:`isthmus.matching.method_named`).
        args: example positional inputs for discovery and verification; default: the start of the first batch.
        kwargs: example keyword inputs.
        spec: the symmetries; default: discovered.
        outputs: outputs that must be preserved (see :func:`isthmus.discover`).
        schedule: order of matching; default: coordinate descent for ``weights`` (and for ``covariance`` with
            ``tie_outgoing``), a single pass in the order of computation for the others.
        tie_outgoing: for ``covariance``: let the weights that read a group count too, each unit weighted by its
            mean square. The paper ties nothing; residual networks, whose streams are written by many layers,
            gain most.
        symmetry: what may act on units, whatever the method's name says. ``"permutations"``; ``"all"`` that each group
            allows (``AxisGroup.acts``): signs, positive factors, rotations, invertible maps; or the largest classes
            that are wanted, such as ``["signed", "positive"]``, by their names in :class:`isthmus.symmetry.Acts`.
            Default: permutations, but where the method's name asks for more.
        check: verify the spec on random relabellings before using it, and measure how far this very relabelling
            changes B's outputs in float64.
        seed: of all randomness (verification, sampling of wide rows, random orders).
        on_stage: told what begins, and how many of how many steps are done.

    Returns:
        The alignment; ``alignment.apply(model_b)`` is B relabelled.

    Raises:
        DataError: unknown method or class of symmetries, a method that needs data was given none, or an option of
            another method.
        ModelError: a model is in training mode, random, or cannot be traced, or B computes something else than its
            tensors do in A's code.
        CheckpointError: different architectures, NaN or infinite weights.
        VerificationError: the spec changes the function of A.

    Source:
        Ferbach et al. 2024, section 6 (covariance, weights-incoming); Ainsworth et al. 2023 (weights);
        Li et al. 2016 (correlation).
    """
    used = _chosen(method, tie_outgoing, data=batches is not None)
    problem = Problem(
        model_a,
        model_b,
        batches=batches,
        args=args,
        kwargs=kwargs,
        spec=spec,
        outputs=outputs,
        seed=seed,
        symmetry=symmetry,
    )
    return _solved(problem, used, schedule, tie_outgoing, check, on_stage or silent)


def solve(
    problem: Problem,
    method: str | Method | None = None,
    *,
    schedule: Schedule | None = None,
    tie_outgoing: bool = False,
    check: bool = True,
    on_stage: OnStage | None = None,
) -> Alignment:
    """Find the relabelling of a problem's B by one method; what other methods collected before is not collected again.

    Args:
        problem: the networks and data.
        method: as for :func:`align`, and so are the other options.
        schedule: order of matching.
        tie_outgoing: for ``covariance``.
        check: verify the spec, once for each problem, and measure how far this relabelling changes B's outputs.
        on_stage: told what begins.

    Raises:
        IsthmusError: as :func:`align`.
    """
    used = _chosen(method, tie_outgoing, data=problem.data is not None)
    return _solved(problem, used, schedule, tie_outgoing, check, on_stage or silent)


def _chosen(method: str | Method | None, tie_outgoing: bool, *, data: bool) -> Method:
    """Return the method that was asked for, if its options and the data fit."""
    found = method_named(method if method is not None else "covariance" if data else "weights")
    if found.needs != "weights" and not data:
        raise no_data(f"method {found.name!r}")
    if not tie_outgoing:
        return found
    if found is not METHODS["covariance"]:
        raise DataError(
            f"tie_outgoing is an option of method 'covariance', found {found.name!r}. 'weights' ties them anyway; "
            "activations are not compared through weights."
        )
    return tied(found)


def _solved(
    problem: Problem,
    method: Method,
    schedule: Schedule | None,
    tie_outgoing: bool,
    check: bool,
    tell: OnStage,
) -> Alignment:
    problem = problem.wanting(method.symmetry)
    if tie_outgoing and problem.symmetry != "permutations":
        raise DataError(
            "tie_outgoing weighs pairs of units, which only permutations have, found symmetry "
            f"{problem.symmetry!r}. Leave tie_outgoing out, or use method='weights', which ties both sides."
        )
    tell("discovering symmetries", 0, 4)
    spec = problem.spec
    if check:
        tell("verifying by running", 1, 4)
        problem.verification.require()
    tell(f"matching by {method.name}", 2, 4)
    found = method.run(problem, schedule, problem.generator())
    match, notes = found.match, found.notes
    match = replace(match, couplings={n: _in_order(spec.groups[n], c) for n, c in match.couplings.items()})
    costs, clusters = _costs(found.objective, match.couplings), found.objective.structure.clusters
    del found  # and with it the gains that the objective kept
    tell("measuring how far outputs change", 3, 4)
    return Alignment(
        couplings={name: match.couplings[name] for name in spec.groups},
        spec=spec,
        method=method.name,
        sweeps=match.sweeps,
        status=match.status,
        costs=costs,
        notes=(*spec.notes, *gains_in_the_way(spec, problem.symmetry), *notes),
        settings={
            "schedule": "default" if schedule is None else repr(schedule),
            "tie_outgoing": tie_outgoing,
            "check": check,
            "constant_units": CONSTANT_UNITS,
            "caches": [[*place, way] for place, way in problem.traced.caches.items()],
            **({} if problem.symmetry == "permutations" else {"symmetry": _listed(problem.symmetry)}),
        },
        seed=problem.seed,
        verification_error=problem.function_change(match.couplings) if check else None,
        digest_a=digest_of(problem.state_a),
        digest_b=digest_of(problem.state_b),
        similarities={}
        if problem.permutes
        else weight_similarities(spec, match.couplings, problem.state_a, problem.state_b, clusters),
    )


def _in_order(group: AxisGroup, coupling: Coupling) -> Coupling:
    """Return the coupling of a group; pairs of units that a method permuted, as if they could be, stay as they are."""
    permuted = isinstance(coupling, Permutation) and bool(group.planes)
    return Permutation.identity(group.size) if permuted else coupling


def _listed(symmetry: Symmetry) -> str | list[str]:
    return str(symmetry) if isinstance(symmetry, str) else [str(name) for name in symmetry]


def silent(stage: str, done: int, total: int) -> None:
    """Ignore a stage: what ``on_stage`` is where the caller gave none."""


def _costs(objective: Objective, at: Couplings) -> dict[str, tuple[float, float]]:
    """Return the matched cost of every group before its cluster moves, and after."""
    costs: dict[str, tuple[float, float]] = {}
    for cluster in objective.structure.clusters:
        others = {g: p for g, p in at.items() if g not in cluster}
        for group in cluster:
            costs[group] = (objective.cost(group, others), objective.cost(group, at))
    return costs
