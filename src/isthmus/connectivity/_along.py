"""Measuring any path between two networks."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, islice
from typing import Any

import torch
from torch import Tensor, nn

from isthmus.batches import Batch, Batches, first_batch, iterate
from isthmus.connectivity._adaptive import FIRST_POINTS, MOST_POINTS, next_points
from isthmus.connectivity._curve import MIDPOINT, Line, curve_from
from isthmus.connectivity._measure import ScoredPositions
from isthmus.connectivity._networks import EndB, Networks, traced_or_plain
from isthmus.connectivity._output import compared, reader
from isthmus.connectivity._positions import path_positions
from isthmus.errors import DataError, IsthmusWarning, ModelError
from isthmus.evaluation import bind, floating_dtype, require_deterministic, require_evaluation
from isthmus.losses import Loss, completed_batches, configs_kept, scorer_for
from isthmus.moments import averaged_statistics, some_layers, statistics_note
from isthmus.paths import Path, Refreshed, Repaired, Straight, require_path
from isthmus.replica import Replica
from isthmus.states import State, check_finite, check_same_architecture, state_of
from isthmus.symmetry import Outputs

__all__ = [
    "NamedData",
    "PathOptions",
    "deterministic",
    "line_along",
    "measured",
    "prepared",
    "statistics_left",
    "warned",
]

ENDPOINT_EXAMPLES = 64
EXAMPLES_CHECKED = 32
_HOW = "wrap the path in isthmus.Refreshed or isthmus.Repaired."


def line_along(
    path: Path,
    model: nn.Module,
    batches: Batches | Mapping[str, Batches],
    *,
    points: int | Sequence[float] | Tensor | str = 11,
    tolerance: float = 1e-3,
    lipschitz: float | None = None,
    loss: Loss | None = None,
    outputs: Outputs = None,
    precision: str | None = None,
    bootstrap: int = 200,
    generator: torch.Generator | None = None,
) -> Line:
    r"""Measure loss, accuracy, barrier and LMC error along a path, straight or not.

    The ends are the path's own, run as they are; the chord joins their losses, and the LMC error compares the outputs
    at ``t`` with the mix of theirs. :func:`line` is this for the straight path to a relabelled network, and checks the
    relabelling besides.

    Args:
        path: any :class:`isthmus.connectivity.Path`.
        model: the architecture, in evaluation mode; its code runs every state, its own tensors are not used.
        batches: as for :func:`line`.
        points: as for :func:`line`.
        tolerance: as for :func:`line`.
        lipschitz: as for :func:`line`.
        loss: as for :func:`line`.
        outputs: as for :func:`line`.
        precision: as for :func:`line`.
        bootstrap: as for :func:`line`.
        generator: as for :func:`line`.

    Returns:
        A :class:`Line`; its setting ``path`` names the classes of the path.

    Raises:
        ModelError: what was given is no path, or does not lead to its ends; a network in training mode, random
            outputs, NaN or infinite losses.
        CheckpointError, ShapeError: the ends, or the state at some point, are not of one architecture or not finite.
        DataError: empty data, no targets, labels out of range, or an option without meaning.

    Example:
        >>> from isthmus.paths import Straight
        >>> net, data = nn.Linear(2, 3).eval(), [(torch.ones(4, 2), torch.tensor([0, 1, 2, 0]))]
        >>> line_along(Straight(net, net), net, data, points=3).barrier
        0.0
    """
    grid = PathOptions(points, tolerance, lipschitz, loss, outputs, precision, bootstrap, generator)
    if not isinstance(model, nn.Module):
        raise ModelError(
            f"Measuring a path: expected model to be a torch.nn.Module whose code runs the states, found "
            f"{type(model).__name__}."
        )
    require_evaluation(model)
    require_path(_innermost(path))
    checked = _Checked(path)
    first, last = checked.ends
    grid.require_precision(first)
    data, replica = prepared(model, batches, grid), Replica(model)
    for letter, state in (("A", first), ("B", last)):
        deterministic(replica, data, grid, state, f"Model {letter}")
    notes = statistics_left(path, model, _HOW)
    return warned(measured(checked, replica, EndB(last), data, grid, {"path": _words(path)}, notes))


class _Checked:
    """A path whose states are checked, and in the dtypes of its first end."""

    def __init__(self, path: Path) -> None:
        first, last = path.ends
        self._path, self.ends, self.straight = path, (state_of(first), state_of(last)), path.straight

    def at(self, t: float) -> State:
        """Return the state at ``t``."""
        name = f"the path at t = {t:g}"
        state, first = state_of(self._path.at(t), name), self.ends[0]
        check_same_architecture(first, state, "the path's end", name)
        check_finite(state, name)
        return {k: v.to(device=first[k].device, dtype=first[k].dtype) for k, v in state.items()}


@dataclass(frozen=True)
class PathOptions:
    """Options of measuring a path, checked: those that :func:`isthmus.connectivity.line` explains."""

    points: int | Sequence[float] | Tensor | str
    tolerance: float
    lipschitz: float | None
    loss: Loss | None
    outputs: Outputs
    precision: str | None
    bootstrap: int
    generator: torch.Generator | None

    def __post_init__(self) -> None:
        if isinstance(self.points, str) and not self.adaptive:
            raise DataError(
                f'Measuring a line: expected a number of points, positions or "adaptive", found {self.points!r}.'
            )
        self.positions()
        if self.bootstrap < 0 or self.bootstrap == 1:
            raise DataError(f"Expected 0 or at least 2 bootstrap resamples, found {self.bootstrap}.")
        for name, value in (("tolerance", self.tolerance), ("lipschitz", self.lipschitz)):
            if value is not None and not (value > 0 and math.isfinite(value)):
                raise DataError(f"Measuring a line: expected {name} above 0, found {value}.")

    @property
    def adaptive(self) -> bool:
        """Whether points are added where the loss may rise."""
        return isinstance(self.points, str) and self.points == "adaptive"

    def positions(self) -> Tensor:
        """Return the first positions, float64."""
        return path_positions(FIRST_POINTS if self.adaptive else self.points)

    def compared(self, model: nn.Module) -> Callable[[Any], Tensor]:
        """Return the function that picks, from all that a network returns, the output that is compared."""
        return compared(reader(self.outputs), self.loss, model)

    def require_precision(self, state: State) -> bool:
        """Tell whether products are lowered to bfloat16, if this state's can be."""
        found = floating_dtype(state)
        known = self.precision in (None, "bfloat16")
        if not known or (self.precision and found not in (torch.float32, torch.bfloat16)):
            raise DataError(
                f'Measuring a line: expected precision=None, or "bfloat16" for a float32 network; found '
                f"{self.precision!r} for a network in {found}."
            )
        return self.precision is not None and found == torch.float32


@dataclass(frozen=True)
class NamedData:
    """Data sets by name; one that is no list is read once for its examples, which come again when it is run."""

    batches: dict[str, Batches]

    @cached_property
    def examples(self) -> dict[str, Batch]:
        """Some first examples of each set."""
        found: dict[str, Batch] = {}
        for name, items in self.batches.items():
            rest = iter(items)
            first = list(islice(rest, 1))
            found[name] = first_batch(first or items, name).head(ENDPOINT_EXAMPLES)
            self.batches[name] = items if isinstance(items, (list, tuple)) else chain(first, rest)
        return found


def prepared(model: nn.Module, batches: Batches | Mapping[str, Batches], grid: PathOptions) -> NamedData:
    """Return the data by name, with the inputs that the network's own loss needs; read at once for adaptive points."""
    data: dict[str, Batches] = {k: completed_batches(model, v) for k, v in _named(batches).items()}
    return NamedData({k: list(iterate(v, k)) for k, v in data.items()} if grid.adaptive else data)


def deterministic(
    replica: Replica, data: NamedData, grid: PathOptions, state: State | None = None, name: str = "The model"
) -> None:
    """Check, on some examples of the first data set, that a network is not random."""
    example = next(iter(data.examples.values())).head(EXAMPLES_CHECKED)
    require_deterministic(replica, example, state, name, grid.compared(replica.source))


def measured(
    path: Path,
    replica: Replica,
    end_b: EndB,
    data: NamedData,
    grid: PathOptions,
    about: Mapping[str, Any],
    notes: Sequence[str],
) -> Line:
    """Measure a path whose ends were checked; notes come first in those of the result.

    Args:
        path: from A to a state that stands for B.
        replica: the code of A and of the points.
        end_b: B as it was trained.
        data: the data.
        grid: how.
        about: settings that say which path it is.
        notes: what is known of the path already.
    """
    state_a = path.ends[0]
    example = next(iter(data.examples.values()))
    models = [r.source for r in (replica, end_b.replica) if r is not None]
    with configs_kept(*models):
        whole = bind(replica, state_a, read=lambda output: output)
        scorer = scorer_for(grid.loss, replica.source, example, whole, reader(grid.outputs))
        few = example.head(EXAMPLES_CHECKED)
        low = grid.require_precision(state_a)
        networks, evaluation = traced_or_plain(path, replica, end_b, low, few, scorer.read)
        sweeps = {name: ScoredPositions(name, items, scorer) for name, items in data.batches.items()}
        ts = grid.positions()
        _run(sweeps, networks, {*ts.tolist(), MIDPOINT})
        if grid.adaptive:
            ts = _refined(sweeps, networks, grid.tolerance, grid.lipschitz)
    generator = torch.Generator().manual_seed(0) if grid.generator is None else grid.generator
    slope = grid.lipschitz
    settings = {
        "points": f"adaptive ({len(ts)})" if grid.adaptive else len(ts),
        "loss": scorer.name,
        **({} if grid.outputs is None else {"outputs": grid.outputs}),
        **about,
        "bootstrap": grid.bootstrap,
        "seed": generator.initial_seed(),
        "precision": grid.precision or str(floating_dtype(state_a)).removeprefix("torch."),
        "evaluation": evaluation,
        "uncertainty": "smooth estimate" if slope is None else f"bound for slope {slope:g}",
    }
    curves = {
        name: curve_from(sweep.per_example(), ts, grid.bootstrap, generator, slope)
        for name, sweep in sweeps.items()
    }
    chance = [sweep.chance_note() for sweep in sweeps.values()]
    told = (*notes, *scorer.notes, *(note for note in chance if note is not None))
    return Line(curves, end_b.error, settings, told, scorer.unit(example))


def warned(found: Line) -> Line:
    """Return a line after its notes were given as warnings at the line that called the caller."""
    for note in found.notes:
        warnings.warn(note, IsthmusWarning, stacklevel=3)
    return found


def statistics_left(path: Path, model: nn.Module, how: str) -> list[str]:
    """Return a note on running statistics that fit no state inside the path: a list of one, or none.

    Args:
        path: the path.
        model: the architecture.
        how: what to do about it.
    """
    if not isinstance(
        path, (Straight, Refreshed, Repaired)
    ):  # nothing is known of what a user's own path does
        layers = averaged_statistics(model, path.ends[0].keys())
        if not layers:
            return []
        return [
            f"Running statistics inside the path ({some_layers(layers)}) are those that {type(path).__name__} gives. "
            f"If it mixes them as it does weights they fit no network, and the losses say little: {how}"
        ]
    note = statistics_note(averaged_statistics(model, path.straight), how, merged=False)
    return [] if note is None else [note]


def _innermost(path: Path) -> Path:
    """Return the path inside those that only work over its interior states."""
    return _innermost(path.path) if isinstance(path, (Refreshed, Repaired)) else path


def _words(path: object) -> str:
    """Return the classes of a path, such as ``Refreshed(Straight)``."""
    inner = f"({_words(path.path)})" if isinstance(path, (Refreshed, Repaired)) else ""
    return type(path).__name__ + inner


def _run(sweeps: Mapping[str, ScoredPositions], networks: Networks, ts: set[float]) -> None:
    interior = sorted(t for t in ts if 0.0 < t < 1.0)
    for sweep in sweeps.values():
        sweep.run(networks, interior)


def _refined(
    sweeps: Mapping[str, ScoredPositions], networks: Networks, tolerance: float, lipschitz: float | None
) -> Tensor:
    """Add positions where the loss may rise highest; return all of them."""
    while True:
        ts = torch.tensor(next(iter(sweeps.values())).positions, dtype=torch.float64)
        wanted: set[float] = set()
        for sweep in sweeps.values():
            wanted |= set(next_points(sweep.mean_losses(), ts, lipschitz, tolerance))
        if not wanted or len(ts) >= MOST_POINTS:
            return ts
        _run(sweeps, networks, set(sorted(wanted)[: MOST_POINTS - len(ts)]))


def _named(batches: Batches | Mapping[str, Batches]) -> dict[str, Batches]:
    """Return data sets by name, catching a batch passed where a list of batches belongs."""
    data = dict(batches) if isinstance(batches, Mapping) else {"data": batches}
    if not data:
        raise DataError("Measuring a line: expected at least one data set, found an empty mapping.")
    for name, items in data.items():
        if isinstance(items, (Tensor, Batch)) or not hasattr(items, "__iter__"):
            raise DataError(
                f"Measuring a line on {name!r}: expected an iterable of batches, found a "
                f"{type(items).__name__}. Put a single batch in a list: [(inputs, targets)]."
            )
    return data
