"""Giving the channels of a mixed network the mean and spread that those of its parents have on average."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from isthmus.batches import Batches, first_batch, iterate, reusable
from isthmus.errors import DataError, ModelError, printable
from isthmus.evaluation import bind, require_evaluation
from isthmus.moments import ChannelMoment
from isthmus.paths._held import HeldLayer, held_layers, watched
from isthmus.replica import Replica
from isthmus.states import State, with_versions_of

__all__ = ["ChannelRepair"]

LayerMoments = dict[HeldLayer, ChannelMoment]
Affine = tuple[Tensor, Tensor]
"""Factor and shift of each channel of a layer's output, float64, shape ``(channels,)``."""

_ROUNDINGS = 4
_FAR = 16
"""Times the rounding of a layer's outputs from which a deviation is known not to be rounding."""
_TOLERANCE = 1e-6
_GIVEN_UP = 1e-3
_MORE_SWEEPS = 2
_HOLDS = ("both", "deviation")


@dataclass(frozen=True)
class Goal:
    """The mean and the standard deviation that every channel of a layer is to have.

    Attributes:
        mean: of each channel, float64, shape ``(channels,)``.
        deviation: standard deviation of each, likewise.
        eps: the rounding of the layer's numbers, relative.
    """

    mean: Tensor
    deviation: Tensor
    eps: float

    @property
    def spread(self) -> float:
        """Root mean square of the deviations; of the outputs, where no channel varies."""
        spread = float(self.deviation.square().mean().sqrt())
        return spread if spread > self.floor else _size(self.mean, self.deviation) or 1.0

    @property
    def floor(self) -> float:
        """Deviation up to which a channel is constant: the rounding of sums as large as the layer's outputs."""
        return _ROUNDINGS * self.eps * _size(self.mean, self.deviation)

    @property
    def nearest(self) -> float:
        """Distance to the goal that a state can be expected to reach, in units of the spread."""
        return max(_GIVEN_UP, 8 * self.eps, _FAR * self.floor / self.spread)


class ChannelRepair:
    """From a mixed state and the shares of its parents to the state whose channels have their mean statistics.

    Args:
        model: the architecture, in evaluation mode; a copy is run.
        parents: states of the networks that are mixed; each is run over the data at once.
        batches: training data.
        layers: names of the modules whose outputs are held; None for those of
            :func:`isthmus.paths._held.held_layers`.
        tolerance: see :class:`isthmus.paths.Repaired`.
        hold: ``"both"``, mean and deviation; or ``"deviation"`` alone, by a factor on the whole output.
        names: how messages call the parents.

    Attributes:
        held: the layers, in the order in which they run.
    """

    def __init__(
        self,
        model: nn.Module | Replica,
        parents: Sequence[State],
        batches: Batches,
        *,
        layers: Sequence[str] | None = None,
        tolerance: float | None = None,
        hold: str = "both",
        names: Sequence[str] | None = None,
    ) -> None:
        if tolerance is not None and not tolerance > 0:
            raise DataError(f"Repairing: expected a tolerance above 0, found {tolerance}.")
        if hold not in _HOLDS:
            raise DataError(f"Repairing: expected hold={' or '.join(map(repr, _HOLDS))}, found {hold!r}.")
        self._replica = Replica.of(model)
        require_evaluation(self._replica.source)
        self._batches, self._tolerance, self._shifted = reusable(batches), tolerance, hold == "both"
        first = first_batch(self._batches)
        self.held = held_layers(self._replica, parents[0], first, layers, shifted=self._shifted)
        self._eps = {layer: torch.finfo(parents[0][layer.weight].dtype).eps for layer in self.held}
        names = [f"network {k}" for k in range(len(parents))] if names is None else names
        self._moments = [self.measured(p, name) for p, name in zip(parents, names, strict=True)]

    def __call__(self, state: State, shares: Sequence[float], where: str = "in the average") -> State:
        """Return the repaired state.

        Args:
            state: the mix of the parents.
            shares: of each parent, summing to 1.
            where: how messages call its place.

        Raises:
            ModelError: a channel that never varies in the mix but does in the parents, or statistics that do not
                settle.
        """
        goals = {layer: self._goal(layer, shares) for layer in self.held}
        done = self._first_sweep(state, goals, where)
        best, least, worst, enough = state, float("inf"), self.held[0], self._enough(goals.values())
        for sweep in range(len(self.held) + _MORE_SWEEPS):
            tried = self._folded(state, done)
            found = self.measured(tried, where)
            errors = {layer: self._distance(found[layer], goal) for layer, goal in goals.items()}
            worst_now = max(errors, key=errors.__getitem__)
            error = errors[worst_now]
            settled = sweep > len(self.held) and error >= least / 2
            if error < least:
                best, least, worst = tried, error, worst_now
            if least <= enough or settled:
                break
            done = {
                k: _after(done[k], self._correction(k, found[k], goal, where)) for k, goal in goals.items()
            }
        if not least <= max(goals[worst].nearest, enough):
            raise ModelError(
                f"Repairing {_at(where)}: the statistics of {printable(worst.path)!r} stay {least:.2g} of the layer's "
                "spread away from their targets. Is the network random, are the batches drawn anew each time, or is "
                "its precision too low? Give a fixed list of batches, float32, or fewer layers=[...]."
            )
        return best

    @property
    def writes(self) -> frozenset[str]:
        """Names of the tensors that may be changed, or need no recomputing."""
        found = {name for layer in self.held for name in layer.tensors}
        kept = set() if self._shifted else {name for layer in self.held for name in layer.statistics}
        return frozenset(found - kept)

    def measured(self, state: Mapping[str, Tensor], where: str) -> LayerMoments:
        """Return the moments of all layers' outputs over the data."""
        return self._swept(state, where, None)

    def _goal(self, layer: HeldLayer, shares: Sequence[float]) -> Goal:
        of = [moments[layer] for moments in self._moments]
        mean, deviation = _mixed([m.mean for m in of], shares), _mixed([m.deviation for m in of], shares)
        return Goal(mean, deviation, self._eps[layer])

    def _enough(self, goals: Iterable[Goal]) -> float:
        return self._tolerance or max(_TOLERANCE, *(8 * goal.eps for goal in goals))

    def _first_sweep(
        self, state: State, goals: Mapping[HeldLayer, Goal], where: str
    ) -> dict[HeldLayer, Affine]:
        """Return corrections found while every layer reads outputs that were corrected by what was seen so far.

        Measuring all layers first and correcting them together would overshoot: the lost spread of a layer is
        seen by all that follow, and each would make up for all of it.
        """
        found = self._swept(state, where, goals)
        return {layer: self._correction(layer, found[layer], goal, where) for layer, goal in goals.items()}

    def _swept(
        self,
        state: Mapping[str, Tensor],
        where: str,
        goals: Mapping[HeldLayer, Goal] | None,
    ) -> LayerMoments:
        found: LayerMoments = {}

        def see(layer: HeldLayer, output: Tensor) -> Tensor | None:
            moment = ChannelMoment.of(output, layer.axis)
            found[layer] = found[layer].merge(moment) if layer in found else moment
            if not bool(found[layer].scatter.isfinite().all()):
                raise DataError(
                    f"Repairing {_at(where)}: NaN or infinite outputs of {printable(layer.path)!r}. The network "
                    "diverged or the data are damaged."
                )
            if goals is None:
                return None
            factor, shift = self._towards(found[layer], goals[layer])
            shape = [1] * output.ndim
            shape[layer.axis] = -1
            return output * factor.to(output).reshape(shape) + shift.to(output).reshape(shape)

        run = bind(self._replica, state, read=lambda output: output)
        batches = iterate(self._batches)
        first = next(batches)
        run.prepare(first)
        with watched(self._replica.module, self.held, see):
            run(first)
            for batch in batches:
                run(batch)
        return found

    def _correction(self, layer: HeldLayer, found: ChannelMoment, goal: Goal, where: str) -> Affine:
        lost = _constant(found, goal) & (goal.deviation > _FAR * goal.floor)
        if bool(lost.any()):
            raise ModelError(
                f"Repairing {_at(where)}: {int(lost.sum())} of {len(lost)} channels of {printable(layer.path)!r} never "
                "vary there, though they do at the ends, and no factor brings them back. Align the networks first, use "
                "more data, or leave the layer out with layers=[...]."
            )
        return self._towards(found, goal)

    def _towards(self, found: ChannelMoment, goal: Goal) -> Affine:
        """Return factor and shift that give the wanted statistics; channels that never vary are only shifted."""
        still, one = _constant(found, goal), torch.ones_like(goal.deviation)
        factor = torch.where(still, one, goal.deviation / torch.where(still, one, found.deviation))
        return factor, goal.mean - factor * found.mean if self._shifted else torch.zeros_like(factor)

    def _distance(self, found: ChannelMoment, goal: Goal) -> float:
        """Return the largest error of what is held, in units of the layer's spread."""
        errors = (found.deviation - goal.deviation).abs()
        if self._shifted:
            errors = torch.maximum((found.mean - goal.mean).abs(), errors)
        return float(errors.max()) / goal.spread

    def _folded(self, state: State, done: Mapping[HeldLayer, Affine]) -> State:
        changed = dict(state)
        for layer, (factor, shift) in done.items():
            changed.update(layer.scaled(state, factor, shift))
        return with_versions_of(state, changed)


def _at(where: str) -> str:
    return where if where.startswith("in ") else f"at {where}"


def _mixed(values: Sequence[Tensor], shares: Sequence[float]) -> Tensor:
    """Return the mean with shares; of two as a path mixes them."""
    if len(values) == 2:
        return torch.lerp(values[0], values[1], shares[1])
    return torch.stack([share * value for share, value in zip(shares, values, strict=True)]).sum(0)


def _constant(found: ChannelMoment, goal: Goal) -> Tensor:
    """Return which channels never vary, up to rounding."""
    size = max(_size(goal.mean, goal.deviation), _size(found.mean, found.deviation))
    return found.deviation <= _ROUNDINGS * goal.eps * size


def _size(mean: Tensor, deviation: Tensor) -> float:
    """Return the root mean square of outputs with these means and deviations."""
    return float((mean.square() + deviation.square()).mean().sqrt())


def _after(first: Affine, then: Affine) -> Affine:
    """Return one affine map after another."""
    return then[0] * first[0], then[0] * first[1] + then[1]
