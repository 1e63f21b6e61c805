r"""Giving channels their spread back from weights alone, where there are no data.

Of two units with spreads :math:`\sigma_0, \sigma_1` and correlation :math:`\rho`, the mix has variance
:math:`(1-t)^2\sigma_0^2 + t^2\sigma_1^2 + 2t(1-t)\rho\,\sigma_0\sigma_1` (Jordan et al. 2022, arXiv:2211.08403).
Without data the correlation is taken to be the cosine of the units' incoming weights, as in the approximate repair of
model folding (Wang et al. 2025, arXiv:2502.10216, Fold-AR). That is exact where the entries of what a layer reads are
uncorrelated and of one size; they seldom are, so it is an estimate.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from isthmus.batches import Batch
from isthmus.errors import ModelError, printable
from isthmus.evaluation import require_evaluation
from isthmus.paths._held import HeldLayer, held_layers
from isthmus.replica import Replica
from isthmus.states import State, with_versions_of

__all__ = ["WeightRepair"]

_VARIANCE, _LOST = "running_var", 1e-6


class WeightRepair:
    r"""From a mixed state and the shares of its parents to the state with the spread that the weights say was lost.

    A linear layer's or convolution's weights are scaled so that their norm, unit by unit, is the mean of the parents';
    biases stay mixed. Of a BatchNorm that directly reads a layer the running variance is set to the one estimated from
    the parents' and the cosines of the layer's weights. Other normalisations find their statistics themselves.

    Args:
        model: the architecture, in evaluation mode; a copy is run once.
        parents: states of the networks that are mixed.
        example: any inputs that the network runs on, to see which layers there are.
        layers: names of the modules that are held, if not those of :class:`isthmus.paths.Repaired`.

    Raises:
        ModelError: naming layers that cannot be held, or BatchNorm layers that read no layer directly.
    """

    def __init__(
        self,
        model: nn.Module | Replica,
        parents: Sequence[State],
        example: Batch,
        *,
        layers: Sequence[str] | None = None,
    ) -> None:
        replica = Replica.of(model)
        require_evaluation(replica.source)
        held = held_layers(replica, parents[0], example, layers, shifted=False)
        modules = dict(replica.module.named_modules())
        self._parents = tuple(parents)
        self._plain = [layer for layer in held if isinstance(modules[layer.path], _WEIGHTED)]
        self._norms = [layer for layer in held if layer.batch_norm and layer.statistics]
        unknown = next((layer for layer in self._norms if layer.source is None), None)
        if unknown is not None:
            raise ModelError(
                f"Repairing without data: {printable(unknown.path)!r} normalises no layer's own output, so nothing is "
                "known of its spread from weights. Give data and another repair, or name the other layers in "
                "layers=[...]."
            )

    def __call__(self, state: State, shares: Sequence[float], where: str = "in the average") -> State:
        """Return the state with its spread put back.

        Args:
            state: the mix of the parents.
            shares: of each parent, summing to 1.
            where: how messages call its place.

        Raises:
            ModelError: the weights of a unit cancel.
        """
        changed = dict(state)
        for layer in self._plain:
            norms = [_norms(parent[layer.weight], layer.weight_axis) for parent in self._parents]
            goal, found = _mean(norms, shares), _norms(state[layer.weight], layer.weight_axis)
            lost = found < _LOST * goal
            if bool(lost.any()):
                raise ModelError(
                    f"Repairing without data {where}: the weights of {int(lost.sum())} of {len(lost)} units of "
                    f"{printable(layer.path)!r} cancel, and no factor brings them back. Align the networks first."
                )
            factor = torch.where(goal > 0, goal / torch.where(goal > 0, found, 1.0), torch.ones_like(goal))
            changed[layer.weight] = layer.scaled(state, factor, torch.zeros_like(factor))[layer.weight]
        for layer in self._norms:
            name = next(n for n in layer.statistics if n.endswith(_VARIANCE))
            changed[name] = self._variance(layer, name, shares).to(state[name])
        return with_versions_of(state, changed)

    @property
    def writes(self) -> frozenset[str]:
        """Names of the tensors that may be changed."""
        variances = {n for layer in self._norms for n in layer.statistics if n.endswith(_VARIANCE)}
        return frozenset(variances | {layer.weight for layer in self._plain})

    def _variance(self, layer: HeldLayer, name: str, shares: Sequence[float]) -> Tensor:
        """Return the variance of the mix of the layer that a norm reads, float64, shape ``(channels,)``."""
        assert layer.source is not None, "the constructor refuses"
        weight, axis = layer.source
        mixed: Tensor | None = None
        for parent, share in zip(self._parents, shares, strict=True):
            rows, spread = _rows(parent[weight], axis), parent[name].double().sqrt()
            norms = rows.norm(dim=1, keepdim=True)
            unit = rows / torch.where(norms > 0, norms, 1.0)
            part = share * spread.to(rows.device)[:, None] * unit
            mixed = part if mixed is None else mixed + part.to(mixed.device)
        assert mixed is not None, "there are parents"
        return mixed.square().sum(1)


_WEIGHTED = (
    nn.Linear,
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)


def _rows(weight: Tensor, axis: int) -> Tensor:
    """Return the incoming weights of each unit, float64, shape ``(units, entries)``."""
    return weight.double().movedim(axis, 0).flatten(1)


def _norms(weight: Tensor, axis: int) -> Tensor:
    return _rows(weight, axis).norm(dim=1)


def _mean(values: Sequence[Tensor], shares: Sequence[float]) -> Tensor:
    return torch.stack([s * v.to(values[0].device) for s, v in zip(shares, values, strict=True)]).sum(0)
