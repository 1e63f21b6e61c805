"""The front door: two networks and, where a method needs it, data in; the relabelling of B out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from isthmus.batches import Batch, Batches, device_of, first_batch, reusable
from isthmus.errors import DataError
from isthmus.evaluation import require_evaluation
from isthmus.losses import completed_batches
from isthmus.matching._activations import ActivationMatching
from isthmus.matching._alignment import Alignment
from isthmus.matching._constant import CONSTANT_UNITS
from isthmus.matching._incremental import Incremental
from isthmus.matching._layers import Layers
from isthmus.matching._methods import (
    METHODS,
    Pair,
    covariance_objective,
    incoming_weight_objective,
    weight_objective,
)
from isthmus.matching._objectives import AbstractObjective
from isthmus.matching._schedules import (
    AbstractSchedule,
    CoordinateDescent,
    Match,
    SinglePass,
    assignment_solver,
)
from isthmus.moments import SiteRunner, find_sites, input_statistics, tensors_met
from isthmus.replica import require_same_code, with_state
from isthmus.states import check_finite, check_same_architecture, digest_of, state_of
from isthmus.symmetry import SymmetrySpec, Trace, discover_from_trace, function_change, trace, verify
from isthmus.symmetry._discover import Outputs

__all__ = ["OnStage", "align"]

OnStage = Callable[[str, int, int], None]
"""Called with the name of a stage, and how many of how many are done."""
_EXAMPLES = 4
"""Examples of the first batch that discovery and verification run on."""


def align(
    model_a: nn.Module,
    model_b: nn.Module | Mapping[str, Tensor],
    *,
    batches: Batches | None = None,
    method: str | None = None,
    args: Any = None,
    kwargs: Mapping[str, Any] | None = None,
    spec: SymmetrySpec | None = None,
    outputs: Outputs = None,
    schedule: AbstractSchedule | None = None,
    tie_outgoing: bool = False,
    check: bool = True,
    seed: int = 0,
    on_stage: OnStage | None = None,
) -> Alignment:
    r"""Find the relabelling of B's hidden units that brings B close to A.

    ``match = objective × coupling solver × schedule``: the method names the objective and its usual schedule,
    the solver is exact linear assignment.

    Args:
        model_a: network A, in evaluation mode; not mutated.
        model_b: network B, or its state; not mutated.
        batches: data (see :mod:`isthmus.batches`); needed by ``covariance`` (one pass of A), ``activations`` and
            ``correlation`` (one pass of both). Shuffled examples, not sorted by class.
        method: ``"weights-incoming"``, ``"weights"``, ``"covariance"``, ``"activations"`` or ``"correlation"``;
            default: ``"covariance"`` with ``batches``, ``"weights"`` without.
        args: example positional inputs for discovery and verification; default: the start of the first batch.
        kwargs: example keyword inputs.
        spec: the symmetries; default: discovered.
        outputs: outputs that must be preserved (see :func:`isthmus.discover`).
        schedule: order of matching; default: coordinate descent for ``weights`` (and for ``covariance`` with
            ``tie_outgoing``), a single pass in the order of computation for the others.
        tie_outgoing: for ``covariance``: let the weights that read a group count too, each unit weighted by its
            mean square. The paper ties nothing; residual networks, whose streams are written by many layers,
            gain most.
        check: verify the spec on random relabellings before using it, and measure how far this very relabelling
            changes B's outputs in float64.
        seed: of all randomness (verification, sampling of wide rows, random orders).
        on_stage: told what begins, and how many of how many steps are done.

    Returns:
        The alignment; ``alignment.apply(model_b)`` is B relabelled.

    Raises:
        DataError: unknown method, a method that needs data was given none, or an option of another method.
        ModelError: a model is in training mode, random, or cannot be traced, or B computes something else than its
            tensors do in A's code.
        CheckpointError: different architectures, NaN or infinite weights.
        VerificationError: the spec changes the function of A.

    Source:
        Ferbach et al. 2024, section 6 (covariance, weights-incoming); Ainsworth et al. 2023 (weights);
        Li et al. 2016 (correlation).
    """
    if method is None:
        method = "weights" if batches is None else "covariance"
    if method not in METHODS:
        raise DataError(f"unknown method {method!r}: expected one of {', '.join(map(repr, METHODS))}.")
    if batches is None and method in ("covariance", "activations", "correlation"):
        raise DataError(f"method {method!r} compares activations: pass batches=..., or use method='weights'.")
    if tie_outgoing and method != "covariance":
        raise DataError(
            f"tie_outgoing is an option of method 'covariance', found {method!r}. 'weights' ties them anyway; "
            "activations are not compared through weights."
        )
    require_evaluation(model_a, "Network A")
    if isinstance(model_b, nn.Module):
        require_evaluation(model_b, "Network B")
    state_a, state_b = state_of(model_a, "A"), state_of(model_b, "B")
    check_same_architecture(state_a, state_b)
    check_finite(state_a, "A")
    check_finite(state_b, "B")
    data = None if batches is None else reusable(completed_batches(model_a, batches))
    example = example_of(args, kwargs, data, model_a)
    tell = on_stage or silent
    tell("discovering symmetries", 0, 4)
    traced = trace(model_a, example.args, example.kwargs)
    generator = torch.Generator().manual_seed(seed)
    spec = discover_from_trace(traced, outputs=outputs) if spec is None else spec
    if check:
        tell("verifying by running", 1, 4)
        verify(spec, model_a, example.args, example.kwargs, outputs=outputs, generator=generator).require()
        if isinstance(model_b, nn.Module):
            require_same_code(model_a, model_b, example.args, example.kwargs)
    tell(f"matching by {method}", 2, 4)
    layers = Layers(
        spec, find_sites(traced), tuple(name for name, _ in model_a.named_parameters()), tensors_met(traced)
    )
    pair = Pair(layers, state_a, state_b)
    if method in ("activations", "correlation"):
        correlation = method == "correlation"
        found = _by_activations(pair, model_a, data, correlation, schedule, generator, traced, example)
    else:
        found = _by_weights(method, pair, model_a, data, tie_outgoing, schedule, generator)
    permutations = found.match.permutations
    tell("measuring how far outputs change", 3, 4)
    return Alignment(
        permutations={name: permutations[name] for name in spec.groups},
        spec=spec,
        method=method,
        sweeps=found.match.sweeps,
        status=found.match.status,
        costs=_costs(found.objective, permutations),
        notes=(*spec.notes, *found.notes),
        settings={
            "schedule": "default" if schedule is None else repr(schedule),
            "tie_outgoing": tie_outgoing,
            "check": check,
            "constant_units": CONSTANT_UNITS,
            "caches": [[*place, way] for place, way in traced.caches.items()],
        },
        seed=seed,
        verification_error=_change(spec, permutations, model_a, state_b, example, outputs) if check else None,
        digest_a=digest_of(state_a),
        digest_b=digest_of(state_b),
    )


def silent(stage: str, done: int, total: int) -> None:
    """Tell nobody."""


@dataclass(frozen=True, eq=False)
class _Found:
    """What was matched, by which objective, and what a reader should know."""

    match: Match
    objective: AbstractObjective
    notes: tuple[str, ...] = ()


def example_of(args: Any, kwargs: Mapping[str, Any] | None, data: Batches | None, model: nn.Module) -> Batch:
    if args is not None or kwargs is not None:
        positional = () if args is None else ((args,) if isinstance(args, Tensor) else tuple(args))
        return Batch(positional, dict(kwargs or {}))
    if data is None:
        raise DataError(
            "align needs example inputs to trace the network: pass batches=... or args=(example input,)."
        )
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), None)
    return first_batch(data).head(_EXAMPLES).to(device_of(model), dtype)


def _by_weights(
    method: str,
    pair: Pair,
    model: nn.Module,
    data: Batches | None,
    tie_outgoing: bool,
    schedule: AbstractSchedule | None,
    generator: torch.Generator,
) -> _Found:
    if method == "weights":
        objective = weight_objective(pair)
    elif method == "weights-incoming":
        objective = incoming_weight_objective(pair)
    else:
        assert data is not None
        runner = SiteRunner(model, first_batch(data))
        statistics = input_statistics(runner, pair.state_a, data, runner.sites, generator)
        objective = covariance_objective(pair, statistics, tie_outgoing=tie_outgoing)
    objective = Incremental(objective)
    if schedule is not None:
        return _Found(schedule.run(objective, assignment_solver, None, generator), objective)
    match = SinglePass().run(objective, assignment_solver, None, generator)
    if method == "weights" or tie_outgoing:
        match = CoordinateDescent().run(objective, assignment_solver, match.permutations, generator)
    return _Found(match, objective)


def _by_activations(
    pair: Pair,
    model: nn.Module,
    data: Batches | None,
    correlation: bool,
    schedule: AbstractSchedule | None,
    generator: torch.Generator,
    traced: Trace,
    example: Batch,
) -> _Found:
    assert data is not None
    runner = SiteRunner(model, first_batch(data))
    matching = ActivationMatching(pair, runner, data, correlation, schedule, generator)
    match, objective = matching.run(traced, example)
    return _Found(match, objective, matching.notes)


def _costs(
    objective: AbstractObjective, permutations: Mapping[str, Tensor]
) -> dict[str, tuple[float, float]]:
    """Return the matched cost of every group before its cluster moves, and after."""
    costs: dict[str, tuple[float, float]] = {}
    for cluster in objective.structure.clusters:
        others = {g: p for g, p in permutations.items() if g not in cluster}
        for group in cluster:
            costs[group] = (objective.cost(group, others), objective.cost(group, permutations))
    return costs


def _change(
    spec: SymmetrySpec,
    permutations: Mapping[str, Tensor],
    model: nn.Module,
    state: Mapping[str, Tensor],
    example: Batch,
    outputs: Outputs,
) -> float:
    """Return how far relabelling moves the outputs of the architecture with another state."""
    other = with_state(model, state)
    return function_change(spec, permutations, other, example.args, example.kwargs, outputs=outputs)
