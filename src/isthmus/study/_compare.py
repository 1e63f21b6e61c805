"""The main job: two networks of one architecture, every method, one record of what was measured.

:func:`compare` makes the record and the arrays that :func:`isthmus.report.write_report` reads.
"""

from __future__ import annotations

import datetime
import itertools
import math
import platform
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy
import torch
from torch import nn

import isthmus
from isthmus.batches import Batches, device_of, first_batch, held
from isthmus.connectivity import Line, line
from isthmus.losses import Loss
from isthmus.matching import (
    METHODS,
    Alignment,
    DimensionTable,
    Method,
    OnStage,
    Problem,
    Symmetry,
    dimensions_of_both,
    method_named,
    method_under,
    solve,
)
from isthmus.moments import chosen_refresh
from isthmus.study._pictured import arrays_of, described, similarities, similarity_request
from isthmus.symmetry import SymmetrySpec, Verification
from isthmus.transport import assign

__all__ = ["Comparison", "compare"]

_EXAMPLES = 8
_SOLVER_SIZE = 1024
"""More units take no other way through the assignment solver."""


@dataclass(frozen=True, eq=False)
class Comparison:
    """What was measured on a pair of networks.

    Attributes:
        record: plain values, the schema of :class:`isthmus.report.Record`.
        arrays: similarity matrices and permutations, by the names the report expects.
        spec: the symmetries.
        alignments: by method.
    """

    record: dict[str, Any]
    arrays: dict[str, np.ndarray]
    spec: SymmetrySpec
    alignments: dict[str, Alignment]


def compare(
    model_a: nn.Module,
    model_b: nn.Module,
    statistics: Batches,
    splits: Mapping[str, Batches],
    *,
    name: str,
    settings: Mapping[str, Any],
    methods: Iterable[str | Method] = METHODS.usual,
    symmetries: Iterable[Symmetry] = ("permutations",),
    spec: SymmetrySpec | None = None,
    points: int = 11,
    headline: str | None = None,
    loss: Loss | None = None,
    refresh: str | None = "auto",
    seed: int = 0,
    on_stage: OnStage | None = None,
) -> Comparison:
    """Align B with A by every method and measure every line.

    Args:
        model_a: network A, in evaluation mode.
        model_b: network B.
        statistics: batches on which the methods compare activations.
        splits: data sets by name on which lines are measured.
        name: what the network is called in the record.
        settings: how the networks were made, as plain values.
        methods: names of methods (``"none"`` is always first); default: ``METHODS.usual``.
        symmetries: by what each of them matches, see :func:`isthmus.matching.align`; a method by more than permutations
            is recorded as ``"weights, all"``.
        spec: the symmetries of the network; default: discovered.
        points: positions on each line.
        headline: the split that the headline numbers use; default the last one.
        loss: see :data:`isthmus.losses.Loss`.
        refresh: what happens to running statistics at interior points, see :func:`isthmus.line`; recomputed on the
            split named ``train``, else on ``statistics``.
        seed: of the methods' randomness.
        on_stage: told how far the work is.

    Raises:
        IsthmusError: whatever discovery, alignment or the lines raise.
    """
    tell = on_stage if on_stage is not None else (lambda stage, done, total: None)
    named, by = [method_named(method) for method in methods], list(symmetries)
    steps = 2 + len(named) * len(by) + 1
    count = _count(statistics)
    tell("reading data", 0, steps)
    statistics = held(statistics)
    splits = {name: held(batches, name) for name, batches in splits.items()}
    example = first_batch(statistics).head(_EXAMPLES).to(device_of(model_a))
    problem = Problem(
        model_a, model_b, batches=statistics, args=example.args, kwargs=example.kwargs, seed=seed, spec=spec
    )
    tell("discovering symmetries", 0, steps)
    spec = problem.spec
    verification = problem.verification
    chosen = headline if headline is not None else list(splits)[-1]

    how = chosen_refresh(refresh, model_a, statistics)
    own_data = how == "batchnorm" and "train" not in splits

    def measure(alignment: Alignment | None) -> Line:
        return line(
            model_a,
            model_b,
            splits,
            points=points,
            loss=loss,
            alignment=alignment,
            refresh=how,
            refresh_batches=statistics if own_data else None,
            generator=torch.Generator().manual_seed(seed),
        )

    tell("measuring the line without relabelling", 1, steps)
    plain = measure(None)
    recorded = {"none": _method(plain, chosen, None, 0.0, {})}
    alignments: dict[str, Alignment] = {}
    tell("looking at activations", 1, steps)
    table_a, table_b, seen = dimensions_of_both(problem, similarity=similarity_request(problem))
    arrays, dimensions = similarities(seen["similarity"]), _means(table_a, table_b)
    tell("preparing the solver", 1, steps)
    _prepare_solver(max((g.size for g in spec.groups.values()), default=0), seed)
    problems = [(symmetry, problem.under(symmetry)) for symmetry in by]
    spec = max(
        (under.spec for _, under in problems), key=lambda s: len(s.groups), default=spec
    )  # with pairs, if any
    for done, (method, (symmetry, under)) in enumerate(itertools.product(named, problems)):
        name_of_row = method_under(method.name, symmetry)
        tell(f"aligning by {name_of_row}", 2 + done, steps)
        under.verification.require()  # once for each symmetry, and before anything is timed
        start = time.perf_counter()
        found = solve(under, method)
        seconds = time.perf_counter() - start
        alignments[name_of_row] = found
        about = dimensions.get(method.name, {})
        recorded[name_of_row] = _method(measure(found), chosen, found, seconds, about)
        arrays |= arrays_of(under, name_of_row, found)
    tell("done", steps, steps)
    record = {
        "isthmus_version": isthmus.__version__,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": _versions(),
        "settings": {**settings, "points": points, "refresh": how, "statistics": count},
        "network": {"name": name, "parameters": sum(p.numel() for p in model_a.parameters())},
        "split": chosen,
        "unit": plain.unit,
        "endpoints": _endpoints(plain),
        "symmetry": _symmetry(spec, verification),
        "methods": recorded,
    }
    return Comparison(record, arrays, spec, alignments)


def _prepare_solver(size: int, seed: int) -> None:
    """Have the assignment solver compiled, if networks of this width need that, before anything is timed."""
    generator = torch.Generator().manual_seed(seed)
    for dtype in (torch.float32, torch.float64):  # gains of weights and of activations
        matrix = torch.randn(
            min(size, _SOLVER_SIZE), min(size, _SOLVER_SIZE), generator=generator, dtype=dtype
        )
        assign(matrix, maximize=True)


def _count(batches: Batches) -> str:
    examples = getattr(batches, "examples", None)
    return f"{len(examples)} examples" if examples is not None else "all batches given"


def _method(
    measured: Line, split: str, found: Alignment | None, seconds: float, dimensions: Mapping[str, Any]
) -> dict[str, Any]:
    curve = measured.curves[split]
    sweeps = () if found is None or len(found.sweeps) < 2 else found.sweeps[1:]
    return {
        "barrier": curve.barrier,
        "midpoint_loss": curve.midpoint_loss,
        "midpoint_accuracy": curve.midpoint_accuracy,
        "verification_error": None if found is None else found.verification_error,
        "seconds": seconds,
        "status": "no relabelling" if found is None else found.status,
        "sweeps": list(sweeps),
        "moved": {} if found is None else found.moved,
        **({"couplings": described(found)} if found is not None and found.symmetry != "permutations" else {}),
        "matched_cost": {}
        if found is None
        else {g: {"before": before, "after": after} for g, (before, after) in found.costs.items()},
        "notes": [*(() if found is None else found.notes), *measured.notes],
        "dimension": dict(dimensions),
        "line": {name: _line(c.to_dict()) for name, c in measured.curves.items()},
    }


def _line(values: Mapping[str, Any]) -> dict[str, Any]:
    kept = (
        "loss",
        "loss_error",
        "accuracy",
        "chord",
        "lmc_error",
        "lmc_error_sup",
        "barrier",
        "barrier_at",
        "barrier_error",
        "midpoint_loss",
        "midpoint_accuracy",
        "ensemble_loss",
        "ensemble_accuracy",
        "examples",
    )
    return {"t": values["ts"], **{k: values[k] for k in kept}}


def _endpoints(plain: Line) -> dict[str, dict[str, dict[str, float | None]]]:
    def scores(end: int) -> dict[str, dict[str, float | None]]:
        return {
            split: {
                "loss": float(curve.loss[end]),
                "accuracy": None if curve.accuracy is None else float(curve.accuracy[end]),
            }
            for split, curve in plain.curves.items()
        }

    return {"a": scores(0), "b": scores(-1)}


def _symmetry(spec: SymmetrySpec, verification: Verification) -> dict[str, Any]:
    return {
        "groups": [
            {
                "name": g.name,
                "size": g.size,
                "acts": g.acts.words,
                **(
                    {"block": {"group": g.within[-1][0], "unit": g.within[-1][1], "family": g.family}}
                    if g.within
                    else {}
                ),
                "slots": [{"tensor": s.tensor, "axis": s.axis, "index": str(s.index)} for s in g.slots],
            }
            for g in spec.groups.values()
        ],
        "pinned": [
            {
                "tensor": p.tensor,
                "axis": p.axis,
                "size": p.size,
                "reason": p.reason,
                "operator": p.operator,
                "module": p.module,
            }
            for p in spec.pinned
        ],
        "fraction_moved": spec.fraction_moved,
        "verification": {
            "max_relative_error": verification.max_relative_error,
            "draws": verification.draws,
            "tolerance": verification.tolerance,
        },
    }


def _means(*of_networks: DimensionTable) -> dict[str, dict[str, Any]]:
    """Return, per method and group, the mean of the networks' dimensions of what is matched."""
    tables = [table.to_dict() for table in of_networks]
    return {
        method: {
            group: {k: _mean([t[method][group][k] for t in tables]) for k in values}
            for group, values in groups.items()
        }
        for method, groups in tables[0].items()
    }


def _mean(values: Sequence[float | None]) -> float | None:
    known = [v for v in values if v is not None and math.isfinite(v)]
    return sum(known) / len(known) if len(known) == len(values) else None


def _versions() -> dict[str, str]:
    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "numpy": np.__version__,
        "scipy": scipy.__version__,
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
    }
