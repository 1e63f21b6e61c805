r"""Paths on which every channel keeps its spread: REPAIR.

Between two networks the averaged weights give pre-activations that vary less than either network's: with correlation
:math:`\rho` of the two units and equal spreads, the variance in the middle is :math:`(1+\rho)/2` of theirs, and this
*variance collapse* deepens from layer to layer. REPAIR (Jordan, Sedghi, Saukh, Entezari & Neyshabur 2022,
arXiv:2211.08403) puts every channel's mean and standard deviation back to the interpolation of the ends'.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from torch import Tensor, nn

from isthmus.batches import Batches
from isthmus.errors import DataError
from isthmus.paths._channels import ChannelRepair
from isthmus.paths._path import Path, require_members
from isthmus.replica import Replica
from isthmus.states import State

__all__ = ["Repaired"]


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

    With ``hold="deviation"`` only the standard deviation is held, by a factor on the channel's whole output: RESCALE of
    Qu & Horvath 2024 (arXiv:2402.05966). Means then go where they go, layers without a bias can be held, and running
    statistics should be recomputed before (``Refreshed.batchnorm``).

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
        hold: ``"both"`` mean and deviation, or ``"deviation"``.

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
        hold: str = "both",
    ) -> None:
        self.path = require_members(path)
        self._repair = ChannelRepair(
            model, path.ends, batches, layers=layers, tolerance=tolerance, hold=hold, names=("t = 0", "t = 1")
        )

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the modules whose outputs are held."""
        return tuple(layer.path for layer in self._repair.held)

    @property
    def ends(self) -> tuple[State, State]:
        """The ends of the path, as they were trained."""
        return self.path.ends

    @property
    def straight(self) -> Collection[str]:
        """The names that were, without the tensors of the layers that are held."""
        return [name for name in self.path.straight if name not in self._repair.writes]

    def at(self, t: float) -> State:
        """Return the state at ``t``, repaired unless ``t`` is 0 or 1."""
        if not 0 <= t <= 1:
            raise DataError(f"Repairing a path: expected t from 0 to 1, found {t}.")
        state = self.path.at(t)
        return state if t in (0, 1) else self._repair(state, (1 - t, t), f"t = {t:g}")

    def statistics(self, state: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
        """Return the mean and standard deviation of every channel held, by module, for a state on the data.

        Both are float64, shape ``(channels,)``; the deviation is normalised by the count.
        """
        found = self._repair.measured(state, "the state")
        return {layer.path: (moment.mean, moment.deviation) for layer, moment in found.items()}
