r"""Batch normalisation in evaluation mode, which is affine: read off a graph or a module, folded into a layer.

With gain :math:`\gamma`, shift :math:`\beta`, mean :math:`\mu` and variance :math:`v`, ``norm(W h + b)`` is the layer
:math:`\tilde W h + \tilde b` with :math:`\tilde W = s W`, :math:`\tilde b = s (b - \mu) + \beta` and
:math:`s = \gamma / \sqrt{v + \epsilon}`, one factor for each unit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from isthmus.symmetry import bound_arguments, operator_of

__all__ = ["BATCH_NORMS", "BatchNorm", "following_norm"]

BATCH_NORMS = frozenset({"aten.batch_norm", "aten._native_batch_norm_legit_no_training"})
"""Operators of batch normalisation in evaluation mode."""

_ROLES = ("weight", "bias", "running_mean", "running_var")


@dataclass(frozen=True)
class BatchNorm:
    """Batch normalisation with running statistics: the names of its tensors in the state, ``None`` for none."""

    weight: str | None
    bias: str | None
    running_mean: str
    running_var: str
    eps: float

    @classmethod
    def from_node(cls, node: fx.Node, tensors: Mapping[str, str]) -> BatchNorm | None:
        """Read an operator of :data:`BATCH_NORMS`; ``None`` if it uses computed tensors or statistics of the batch.

        Args:
            node: the operator.
            tensors: from placeholder to the name of the state's tensor, as in :class:`isthmus.symmetry.Trace`.
        """
        given = bound_arguments(node)
        found = [tensors.get(a.name, "") if isinstance(a := given.get(k), fx.Node) else None for k in _ROLES]
        weight, bias, mean, variance = found
        if not mean or not variance or "" in found:
            return None
        return cls(weight, bias, mean, variance, float(given["eps"]))

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the tensors it has."""
        return tuple(n for n in (getattr(self, key) for key in _ROLES) if n is not None)

    def scale(self, state: Mapping[str, Tensor]) -> Tensor:
        """Return the factor of every channel, float64, shape ``(channels,)``."""
        scale = (state[self.running_var].double() + self.eps).rsqrt()
        return scale if self.weight is None else scale * state[self.weight].double()

    def affine(self, state: Mapping[str, Tensor], bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return scale and shift of every channel, float64, each of shape ``(channels,)``.

        Args:
            state: the tensors by name.
            bias: of the layer before, ``(channels,)``; its part of the result goes into the shift.
        """
        scale, mean = self.scale(state), state[self.running_mean].double()
        shift = (-mean if bias is None else bias.double() - mean) * scale
        return scale, shift if self.bias is None else shift + state[self.bias].double()

    def fold(
        self,
        state: Mapping[str, Tensor],
        weight: Tensor,
        bias: Tensor | None,
        *,
        axis: int = 0,
        dtype: torch.dtype = torch.float64,
    ) -> tuple[Tensor, Tensor]:
        """Return the layer that computes another and then this normalisation: weight in ``dtype``, bias in float64.

        Args:
            state: the tensors by name.
            weight: of the layer before, any shape.
            bias: of the layer before, ``(channels,)``.
            axis: axis of the weight that lists the channels.
            dtype: precision of the product of weight and scale, which is float64 until then.
        """
        scale, shift = self.affine(state, bias)
        shape = [-1 if k == axis else 1 for k in range(weight.ndim)]
        return weight.to(dtype) * scale.to(dtype).reshape(shape), shift


def following_norm(node: fx.Node, tensors: Mapping[str, str], axis: int) -> tuple[BatchNorm, str] | None:
    """Return the batch normalisation that alone reads a node, and the node of its result; None if none folds.

    Args:
        node: a layer's operator.
        tensors: from placeholder to the name of the state's tensor.
        axis: axis of the node's value that lists its channels; batch normalisation acts on axis 1.
    """
    users = list(node.users)
    if axis != 1 or len(users) != 1 or operator_of(users[0]) not in BATCH_NORMS:
        return None
    # its other tensors are the state's, so it is this node that it normalises
    norm = BatchNorm.from_node(users[0], tensors)
    if norm is None:
        return None
    # an operator that also gives its statistics: its first user takes the value
    results = () if operator_of(users[0]) == "aten.batch_norm" else tuple(users[0].users)
    return norm, (*results, users[0])[0].name
