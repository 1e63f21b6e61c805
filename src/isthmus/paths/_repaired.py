r"""Paths on which every channel keeps its spread: REPAIR.

Between two networks the averaged weights give pre-activations that vary less than either network's: with correlation
:math:`\rho` of the two units and equal spreads, the variance in the middle is :math:`(1+\rho)/2` of theirs, and this
*variance collapse* deepens from layer to layer. REPAIR (Jordan, Sedghi, Saukh, Entezari & Neyshabur 2022,
arXiv:2211.08403) puts every channel's mean and standard deviation back to the interpolation of the ends'.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from isthmus.batches import Batches, first_batch, iterate, reusable
from isthmus.errors import DataError, ModelError, printable
from isthmus.evaluation import bind, require_evaluation
from isthmus.moments import ChannelMoment
from isthmus.paths._held import HeldLayer, held_layers, watched
from isthmus.paths._path import Path, require_members
from isthmus.replica import Replica
from isthmus.states import State, with_versions_of

__all__ = ["Repaired"]

LayerMoments = dict[HeldLayer, ChannelMoment]
Affine = tuple[Tensor, Tensor]
"""Factor and shift of each channel of a layer's output, float64, shape ``(channels,)``."""


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


_ROUNDINGS = 4
_FAR = 16
"""Times the rounding of a layer's outputs from which a deviation is known not to be rounding."""
_TOLERANCE = 1e-6
_GIVEN_UP = 1e-3
_MORE_SWEEPS = 2


class Repaired:
    r"""A path on which, at interior points, every channel has the interpolated mean and standard deviation.

    With :math:`\mu_e, \sigma_e` the mean and standard deviation over the data of one channel's pre-activation in
    end :math:`e`, each interior state's weight and bias of that channel are rescaled so that its own are
    :math:`(1-t)\mu_0+t\mu_1` and :math:`(1-t)\sigma_0+t\sigma_1` (Jordan et al. 2022, arXiv:2211.08403). The
    result is a state of the same architecture: no layer is added. Beyond the paper:

    * the paper sets the statistics by BatchNorm layers that are run in training mode, so that a layer's statistics are
      measured while those before it follow each batch. Here that is the first sweep over the data, some per cent off;
      further sweeps measure the state as it is and correct what is left, until all channels agree to ``tolerance``.
      Each makes at least one more layer exact, in their order, so there are no more than layers, and two. One
      sweep is as dear as running the data once; a larger tolerance needs fewer.
    * a normalisation behind a layer is repaired in its place: its gain and bias are rescaled. Running statistics
      need no recomputing then: the error they make is affine in each channel, and is undone with the rest.

    Held are the outputs of ``nn.Linear`` and convolutions, of normalisations that directly read these, and of all
    BatchNorm layers. The layer whose output the network returns is left as it is: its outputs are no pre-activations.

    Args:
        path: the path that gives the states, such as a :class:`isthmus.connectivity.Straight` to an aligned network.
        model: the architecture, in evaluation mode; it is neither run nor changed, a copy is.
        batches: training data; read at once for the ends, and several times for every point. Targets are not used.
        layers: names of the modules whose outputs are held, if not those above.
        tolerance: largest difference of a mean or standard deviation from its target that is left, in units of
            the layer's spread (root mean square over channels). By default 1e-6, or 8 roundings of the dtype. Where
            rounding does not let it be reached (outputs far larger than the layer's spread), the nearest is taken.

    Attributes:
        layers: names of the modules that are held, in the order in which they run.

    Raises:
        ModelError: what was given is no path; or naming layers whose statistics cannot be set: without a bias, with
            shared weights, run several times, with code of their own, or weights that are applied where no layer's
            output is seen. At a point: a channel that never varies there but does at the ends, or statistics that do
            not settle.
        DataError: no data, NaN or infinite activations, a name that is no module, or ``t`` outside 0 to 1.
        CheckpointError, ShapeError: the ends are no states of the model.
    """

    def __init__(
        self,
        path: Path,
        model: nn.Module | Replica,
        batches: Batches,
        *,
        layers: Sequence[str] | None = None,
        tolerance: float | None = None,
    ) -> None:
        if tolerance is not None and not tolerance > 0:
            raise DataError(f"Repairing: expected a tolerance above 0, found {tolerance}.")
        self._replica = Replica.of(model)
        require_evaluation(self._replica.source)
        self.path, self._batches = require_members(path), reusable(batches)
        first, last = path.ends
        self._held = held_layers(self._replica, first, first_batch(self._batches), layers)
        self._moments = self._measured(first, "t = 0"), self._measured(last, "t = 1")
        self._tolerance = tolerance

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the modules whose outputs are held."""
        return tuple(layer.path for layer in self._held)

    @property
    def ends(self) -> tuple[State, State]:
        """The ends of the path, as they were trained."""
        return self.path.ends

    @property
    def straight(self) -> Collection[str]:
        """The names that were, without the tensors of the layers that are held."""
        held = {n for layer in self._held for n in (layer.weight, layer.bias, *layer.statistics)}
        return [name for name in self.path.straight if name not in held]

    def at(self, t: float) -> State:
        """Return the state at ``t``, repaired unless ``t`` is 0 or 1."""
        if not 0 <= t <= 1:
            raise DataError(f"Repairing a path: expected t from 0 to 1, found {t}.")
        state = self.path.at(t)
        if t in (0, 1):
            return state
        goals = {layer: self._goal(layer, t) for layer in self._held}
        done = self._first_sweep(state, goals, t)
        best, least, worst, enough = state, float("inf"), self._held[0], self._enough(goals.values())
        for sweep in range(len(self._held) + _MORE_SWEEPS):
            tried = self._folded(state, done)
            found = self._measured(tried, f"t = {t:g}")
            errors = {layer: _distance(found[layer], goal) for layer, goal in goals.items()}
            where = max(errors, key=errors.__getitem__)
            error = errors[where]
            settled = sweep > len(self._held) and error >= least / 2
            if error < least:
                best, least, worst = tried, error, where
            if least <= enough or settled:
                break
            done = {k: _after(done[k], self._correction(k, found[k], goal, t)) for k, goal in goals.items()}
        if not least <= max(goals[worst].nearest, enough):
            raise ModelError(
                f"Repairing at t = {t:g}: the statistics of {printable(worst.path)!r} stay {least:.2g} of the layer's "
                "spread away from their targets. Is the network random, are the batches drawn anew each time, or is "
                "its precision too low? Give a fixed list of batches, float32, or fewer layers=[...]."
            )
        return best

    def statistics(self, state: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
        """Return the mean and standard deviation of every channel held, by module, for a state on the data.

        Both are float64, shape ``(channels,)``; the deviation is normalised by the count.
        """
        found = self._measured(state, "the state")
        return {layer.path: (moment.mean, moment.deviation) for layer, moment in found.items()}

    def _goal(self, layer: HeldLayer, t: float) -> Goal:
        first, last = (moments[layer] for moments in self._moments)
        eps = torch.finfo(self.ends[0][layer.weight].dtype).eps
        return Goal(torch.lerp(first.mean, last.mean, t), torch.lerp(first.deviation, last.deviation, t), eps)

    def _enough(self, goals: Iterable[Goal]) -> float:
        return self._tolerance or max(_TOLERANCE, *(8 * goal.eps for goal in goals))

    def _measured(self, state: Mapping[str, Tensor], where: str) -> LayerMoments:
        """Return the moments of all layers' outputs over the data."""
        return self._swept(state, where, None, 0.0)

    def _first_sweep(
        self, state: State, goals: Mapping[HeldLayer, Goal], t: float
    ) -> dict[HeldLayer, Affine]:
        """Return corrections found while every layer reads outputs that were corrected by what was seen so far.

        Measuring all layers first and correcting them together would overshoot: the lost spread of a layer is
        seen by all that follow, and each would make up for all of it.
        """
        found = self._swept(state, f"t = {t:g}", goals, t)
        return {layer: self._correction(layer, found[layer], goal, t) for layer, goal in goals.items()}

    def _swept(
        self,
        state: Mapping[str, Tensor],
        where: str,
        goals: Mapping[HeldLayer, Goal] | None,
        t: float,
    ) -> LayerMoments:
        found: LayerMoments = {}

        def see(layer: HeldLayer, output: Tensor) -> Tensor | None:
            moment = ChannelMoment.of(output, layer.axis)
            found[layer] = found[layer].merge(moment) if layer in found else moment
            if not bool(found[layer].scatter.isfinite().all()):
                raise DataError(
                    f"Repairing at {where}: NaN or infinite outputs of {printable(layer.path)!r}. The network "
                    "diverged or the data are damaged."
                )
            if goals is None:
                return None
            factor, shift = _towards(found[layer], goals[layer])
            shape = [1] * output.ndim
            shape[layer.axis] = -1
            return output * factor.to(output).reshape(shape) + shift.to(output).reshape(shape)

        run = bind(self._replica, state, read=lambda output: output)
        batches = iterate(self._batches)
        first = next(batches)
        run.prepare(first)
        with watched(self._replica.module, self._held, see):
            run(first)
            for batch in batches:
                run(batch)
        return found

    def _correction(self, layer: HeldLayer, found: ChannelMoment, goal: Goal, t: float) -> Affine:
        lost = _constant(found, goal) & (goal.deviation > _FAR * goal.floor)
        if bool(lost.any()):
            raise ModelError(
                f"Repairing at t = {t:g}: {int(lost.sum())} of {len(lost)} channels of {printable(layer.path)!r} never "
                "vary there, though they do at the ends, and no factor brings them back. Align the networks first, use "
                "more data, or leave the layer out with layers=[...]."
            )
        return _towards(found, goal)

    def _folded(self, state: State, done: Mapping[HeldLayer, Affine]) -> State:
        changed = dict(state)
        for layer, (factor, shift) in done.items():
            changed.update(layer.scaled(state, factor, shift))
        return with_versions_of(state, changed)


def _constant(found: ChannelMoment, goal: Goal) -> Tensor:
    """Return which channels never vary, up to rounding."""
    size = max(_size(goal.mean, goal.deviation), _size(found.mean, found.deviation))
    return found.deviation <= _ROUNDINGS * goal.eps * size


def _size(mean: Tensor, deviation: Tensor) -> float:
    """Return the root mean square of outputs with these means and deviations."""
    return float((mean.square() + deviation.square()).mean().sqrt())


def _towards(found: ChannelMoment, goal: Goal) -> Affine:
    """Return factor and shift that give the wanted mean and deviation; channels that never vary are only shifted."""
    still, one = _constant(found, goal), torch.ones_like(goal.deviation)
    factor = torch.where(still, one, goal.deviation / torch.where(still, one, found.deviation))
    return factor, goal.mean - factor * found.mean


def _after(first: Affine, then: Affine) -> Affine:
    """Return one affine map after another."""
    return then[0] * first[0], then[0] * first[1] + then[1]


def _distance(found: ChannelMoment, goal: Goal) -> float:
    """Return the largest error of a mean or a deviation, in units of the layer's spread."""
    errors = torch.maximum((found.mean - goal.mean).abs(), (found.deviation - goal.deviation).abs())
    return float(errors.max()) / goal.spread
