"""The main job: two networks of one architecture, every method, one record of what was measured.

:func:`compare` makes the record and the arrays that :func:`isthmus.report.write_report` reads.
"""

from __future__ import annotations

import datetime
import math
import platform
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy
import torch
from torch import Tensor, nn

import isthmus
from isthmus.batches import Batches, device_of, first_batch, held
from isthmus.connectivity import Line, line
from isthmus.couplings import Monomial, Permutation
from isthmus.losses import Loss
from isthmus.matching import (
    METHODS,
    Alignment,
    DimensionTable,
    Method,
    OnStage,
    Problem,
    dimensions_of_both,
    method_named,
    solve,
)
from isthmus.moments import CrossMoment, CrossRequest, Frame, Tap, chosen_refresh
from isthmus.symmetry import SymmetrySpec, Verification
from isthmus.transport import assign

__all__ = ["Comparison", "compare"]

_EXAMPLES = 8
_LARGEST_PICTURE = 1024
"""Groups with more units store no similarity matrix: their picture would not fit in a page."""

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
    used = [method_named(method) for method in methods]
    steps = 2 + len(used) + 1
    count = _count(statistics)
    tell("reading data", 0, steps)
    statistics = held(statistics)
    splits = {name: held(batches, name) for name, batches in splits.items()}
    example = first_batch(statistics).head(_EXAMPLES).to(device_of(model_a))
    problem = Problem(
        model_a, model_b, batches=statistics, args=example.args, kwargs=example.kwargs, seed=seed
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
    similarity = CrossRequest(_pictured(problem), Frame(spec, {}))
    table_a, table_b, seen = dimensions_of_both(problem, similarity=similarity)
    arrays, dimensions = _similarities(seen["similarity"]), _means(table_a, table_b)
    tell("preparing the solver", 1, steps)
    _prepare_solver(max((g.size for g in spec.groups.values()), default=0), seed)
    for done, method in enumerate(used):
        tell(f"aligning by {method.name}", 2 + done, steps)
        start = time.perf_counter()
        found = solve(problem, method)
        seconds = time.perf_counter() - start
        alignments[method.name] = found
        about = dimensions.get(method.name, {})
        recorded[method.name] = _method(measure(found), chosen, found, seconds, about)
        places = {g: c.index for g, c in found.couplings.items() if isinstance(c, Permutation | Monomial)}
        arrays.update({f"permutation/{method.name}/{g}": index.numpy() for g, index in places.items()})
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


def _pictured(problem: Problem) -> dict[str, list[Tap]]:
    """Return where each group's units are seen first, for the groups that are not too large for a picture."""
    layers = problem.layers
    return {
        g: listed[:1] for g, listed in layers.taps().items() if listed and layers.sizes[g] <= _LARGEST_PICTURE
    }


def _similarities(found: Mapping[str, Sequence[CrossMoment]]) -> dict[str, np.ndarray]:
    """Return correlations of A's units with B's, by group; NaN for units that never vary.

    Rows that are units themselves are replaced by their mean: B lists them in another order.
    """
    arrays: dict[str, np.ndarray] = {}
    for group, moments in found.items():
        matrix: Tensor = moments[0].correlation.clone()
        constant_a, constant_b = moments[0].constant_units
        matrix[constant_a] = math.nan
        matrix[:, constant_b] = math.nan
        arrays[f"similarity/{group}"] = matrix.float().cpu().numpy()
    return arrays


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
