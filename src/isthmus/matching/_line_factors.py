r"""Factors for which the layers of the midpoint err least: a quartic polynomial of joint moments, without any training.

A layer :math:`R` of A reads units :math:`h_A`; the same layer :math:`S` of B, relabelled, reads :math:`h_B`. With the
factors :math:`\Lambda` on B's units (and :math:`M` on the layer's outputs) the layer halfway computes
:math:`\tfrac14 (R + M S \Lambda^{-1})(h_A + \Lambda h_B)` where the units themselves average, and misses the average of
both outputs by

.. math:: -\tfrac14 (R - M S \Lambda^{-1})(h_A - \Lambda h_B) .

So neither side of a unit counts alone. What makes its holders agree may make its readers differ, and the error is a
product. Where two units have nothing to do with each other, the least error is at
:math:`\lambda^4 = E h_A^2 \lvert s\rvert^2 / (E h_B^2 \lvert r\rvert^2)`, the geometric mean of both sides; of units
that partly agree, and of all together, the mean square of the error is a polynomial in factors and their inverses,
minimised here over all groups at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from isthmus.couplings import Coupling, Monomial, Permutation
from isthmus.layers import Site, matrix_of
from isthmus.matching._problem import Problem
from isthmus.matching._sided import power_of
from isthmus.moments import InputStatistics, PairedInputRequest, RowSample, collected
from isthmus.symmetry import Acts, Relabelling, Slot

__all__ = ["LayerErrors", "line_factors"]

_STEPS = 40
"""Steps of the search: perceptrons on MNIST are within a thousandth of the least error after 20."""


@dataclass(frozen=True, eq=False)
class _Moments:
    """Second moments of what flows into a layer in A and in B, float64, each ``(features, features)``."""

    of_a: Tensor
    between: Tensor
    of_b: Tensor

    def square_of(self, weights: Tensor, factors: Tensor) -> Tensor:
        """Return the mean square of a layer that reads A's units minus B's times factors."""
        crossed = self.between * factors
        moment = self.of_a - crossed - crossed.T + self.of_b * factors * factors[:, None]
        return ((weights @ moment) * weights).sum()


@dataclass(frozen=True, eq=False)
class _Rows:
    """Rows that flow into a layer too wide for its moments, A's and B's, each ``(rows, features)``."""

    of_a: Tensor
    of_b: Tensor

    def square_of(self, weights: Tensor, factors: Tensor) -> Tensor:
        """Return the mean square of a layer that reads A's units minus B's times factors."""
        return ((self.of_a - self.of_b * factors) @ weights.T).square().sum() / len(self.of_a)


def _units_of(statistics: InputStatistics) -> _Moments | _Rows:
    source, half = statistics.source, len(statistics.mean) // 2
    if isinstance(source, RowSample):
        rows = source.rows.double().cpu()
        return _Rows(rows[:, :half], rows[:, half:])
    whole = source.second_moment.cpu()
    return _Moments(whole[:half, :half], whole[:half, half:], whole[half:, half:])


@dataclass(frozen=True, eq=False)
class _ErringLayer:
    """One layer of both networks, and which factor acts on which of its rows and columns.

    Attributes:
        a: A's weight, float64, shape ``(outputs, features)``.
        b: B's, relabelled, same shape.
        units: what flows into the layer in both networks.
        columns: by group, the unit of every feature, -1 where the group does not act.
        rows: the same for outputs.
        spread: variance of A's outputs, summed.
    """

    a: Tensor
    b: Tensor
    units: _Moments | _Rows
    columns: Mapping[str, Tensor]
    rows: Mapping[str, Tensor]
    spread: float

    def error(self, logs: Mapping[str, Tensor]) -> Tensor:
        """Return the mean squared error of the layer halfway, relative to A's variance."""
        inflow = _factors_at(self.columns, logs, self.b.shape[1])
        outflow = _factors_at(self.rows, logs, self.b.shape[0])
        apart = self.a - outflow[:, None] * self.b / inflow
        return self.units.square_of(apart, inflow) / (16 * self.spread)


def _factors_at(places: Mapping[str, Tensor], logs: Mapping[str, Tensor], count: int) -> Tensor:
    total = torch.zeros(count, dtype=torch.float64)
    for group, units in places.items():
        padded = torch.cat([logs[group], logs[group].new_zeros(1)])
        total = total + padded[units]
    return total.exp()


class LayerErrors:
    """How far the layers of the midpoint err, as a function of factors on B's units.

    Args:
        layers: those that read units with factors.
        sizes: units of the groups that may have factors.
    """

    def __init__(self, layers: Sequence[_ErringLayer], sizes: Mapping[str, int]) -> None:
        self._layers, self.sizes = tuple(layers), dict(sizes)

    @classmethod
    def between(cls, problem: Problem, at: Mapping[str, Coupling], groups: Sequence[str]) -> LayerErrors:
        """Return the errors between A and B under couplings: one pass of both networks over the data.

        Args:
            problem: the networks and data.
            at: couplings that B has already.
            groups: those that may have further factors. Layers that say otherwise than by whole rows and columns how
                they act on them (grouped convolutions) are left out.
        """
        layers = problem.layers
        sites = {s.name: s for s in layers.sites if s.channels_listed}
        placed = {name: _places(problem, site, groups) for name, site in sites.items()}
        wanted = [name for name, found in placed.items() if found is not None and found[0]]
        moved = Relabelling(problem.spec, at).apply(problem.state_b)
        request = PairedInputRequest(wanted, problem.generator())
        statistics = collected(problem.runner, problem.batches, [request], problem.state_a, moved)[0]
        return cls(
            [
                _layer_of(problem, sites[name], statistics[name], moved, *(placed[name] or ({}, {})))
                for name in wanted
            ],
            {name: problem.spec.groups[name].size for name in groups},
        )

    def value(self, logs: Mapping[str, Tensor]) -> Tensor:
        """Return the sum of the layers' errors under the logarithms of factors, by group."""
        found = [layer.error(logs) for layer in self._layers]
        return torch.stack(found).sum() if found else torch.zeros((), dtype=torch.float64)

    def least(self, steps: int = _STEPS) -> dict[str, Tensor]:
        """Return the logarithms of the factors of least error that a descent from one finds, never worse than one.

        Args:
            steps: of the limited-memory BFGS method with Wolfe's conditions.
        """
        logs = {n: torch.zeros(k, dtype=torch.float64, requires_grad=True) for n, k in self.sizes.items()}
        best, least = {n: x.detach().clone() for n, x in logs.items()}, float(self.value(logs).detach())
        if not self._layers or not logs:
            return best
        search = torch.optim.LBFGS(
            list(logs.values()), max_iter=steps, history_size=20, line_search_fn="strong_wolfe"
        )

        def closure() -> Tensor:
            search.zero_grad()
            value = self.value(logs)
            value.backward()
            return value

        with torch.enable_grad():
            search.step(closure)
        reached = float(self.value(logs).detach())
        return {n: x.detach().clone() for n, x in logs.items()} if reached < least else best


def line_factors(problem: Problem, at: Mapping[str, Coupling]) -> dict[str, Coupling]:
    """Return couplings with the factors of least error of the midpoint's layers; pairs and signs stay.

    Args:
        problem: the networks and data; its classes say which groups may have factors.
        at: couplings by group, whose factors are the start.
    """
    groups = [
        name
        for name, acts in problem.classes.items()
        if acts in (Acts.POSITIVE, Acts.MONOMIAL) and isinstance(at[name], Permutation | Monomial)
    ]
    if not groups:
        return dict(at)
    found = LayerErrors.between(problem, at, groups).least()
    return {**at, **{name: at[name].then(_scaled(logs)) for name, logs in found.items()}}


def _scaled(logs: Tensor) -> Monomial:
    return Monomial(torch.arange(len(logs)), logs.exp())


def _layer_of(
    problem: Problem,
    site: Site,
    statistics: InputStatistics,
    moved: Mapping[str, Tensor],
    columns: Mapping[str, Tensor],
    rows: Mapping[str, Tensor],
) -> _ErringLayer:
    a, b = (matrix_of(s[site.weight].detach().double(), site).cpu() for s in (problem.state_a, moved))
    units, mean = _units_of(statistics), statistics.mean.cpu()[: a.shape[1]]
    spread = float(units.square_of(a, torch.zeros(a.shape[1]).double()) - (a @ mean).square().sum())
    return _ErringLayer(a, b, units, columns, rows, max(spread, torch.finfo(torch.float64).tiny))


def _places(
    problem: Problem, site: Site, groups: Sequence[str]
) -> tuple[dict[str, Tensor], dict[str, Tensor]] | None:
    """Return, by group, the unit of every feature that a layer reads and of every output; ``None`` if not so simple."""
    shape = problem.spec.shapes[site.weight]
    found: tuple[dict[str, Tensor], dict[str, Tensor]] = ({}, {})
    for axis, name, slot in _acting(problem, site):
        power = power_of(slot)
        if name not in groups or power == 0:
            continue
        inward = axis == site.in_axis
        if slot.block or power != (-1 if inward else 1) or name in found[not inward]:
            return None
        units = torch.full((shape[axis],), -1)
        positions = slot.index.positions()
        units[positions.flatten()] = torch.arange(len(positions)).repeat_interleave(positions[0].numel())
        spots = [1] * len(shape)
        spots[axis] = -1
        matrix = matrix_of(units.reshape(spots).expand(tuple(shape)), site)
        found[not inward][name] = matrix[0] if inward else matrix[:, 0]
    return found


def _acting(problem: Problem, site: Site) -> Iterator[tuple[int, str, Slot]]:
    for axis, listed in problem.layers.table.get(site.weight, {}).items():
        for name, slot in listed:
            yield axis, name, slot
