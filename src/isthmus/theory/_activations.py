r"""Activations a certificate knows: Lipschitz constants and Jensen gaps.

For an activation :math:`\sigma` and endpoint pre-activations :math:`a, b` the Jensen gap is
:math:`J(t) = \sigma((1-t)a + tb) - (1-t)\sigma(a) - t\sigma(b)`. With slopes in :math:`[\alpha, \beta]` and
:math:`|\sigma''| \le M_2`,

.. math:: \sup_t |J| \le \min\Bigl\{ \tfrac{\beta-\alpha}{4}\,|a-b|,\; \tfrac{M_2}{8}\,(a-b)^2 \Bigr\} .

[O] theory note 3.2. Piecewise linear activations with one kink get the exact value.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["ACTIVATIONS", "Activation", "kink_gap"]

Gap = Callable[[Tensor, Tensor, Mapping[str, Any]], Tensor]


def kink_gap(a: Tensor, b: Tensor) -> Tensor:
    r"""Return the exact gap of ReLU, :math:`|ab|/(|a|+|b|)` where the signs differ, else zero."""
    product = (a * b).neg_().clamp_min_(0)
    return product.div_((a.abs().add_(b.abs())).clamp_min_(torch.finfo(a.dtype).tiny))


@dataclass(frozen=True)
class Activation:
    """An elementwise function: its Lipschitz constant and its largest Jensen gap, given the node's arguments."""

    lipschitz: Callable[[Mapping[str, Any]], float]
    gap: Gap


def _smooth(low: float, high: float, curvature: float) -> Activation:
    def gap(a: Tensor, b: Tensor, _: Mapping[str, Any]) -> Tensor:
        distance = (a - b).abs()
        by_slope = (high - low) / 4 * distance
        return (
            by_slope if math.isinf(curvature) else torch.minimum(by_slope, curvature / 8 * distance.square())
        )

    return Activation(lambda _: max(abs(low), abs(high)), gap)


def _kinked(slope: Callable[[Mapping[str, Any]], float]) -> Activation:
    return Activation(
        lambda given: max(1.0, abs(slope(given))),
        lambda a, b, given: abs(1 - slope(given)) * kink_gap(a, b),
    )


def _sloped(low: float, high: float) -> Activation:
    return _smooth(low, high, math.inf)


ACTIVATIONS: Mapping[str, Activation] = {
    "aten.relu": _kinked(lambda _: 0.0),
    "aten.leaky_relu": _kinked(lambda given: float(given["negative_slope"])),
    "aten.abs": _kinked(lambda _: -1.0),
    "aten.relu6": _sloped(0.0, 1.0),
    "aten.hardtanh": _sloped(0.0, 1.0),
    "aten.clamp": _sloped(0.0, 1.0),
    "aten.hardsigmoid": _sloped(0.0, 1 / 6),
    "aten.hardswish": _sloped(-0.5, 1.5),
    # slopes and largest |second derivative|; values rounded outwards
    "aten.tanh": _smooth(0.0, 1.0, 4 / (3 * math.sqrt(3)) + 1e-12),
    "aten.sigmoid": _smooth(0.0, 0.25, 1 / (6 * math.sqrt(3)) + 1e-12),
    "aten.softplus": _smooth(0.0, 1.0, 0.25),
    "aten.gelu": _smooth(-0.14, 1.14, 0.80),
    "aten.silu": _smooth(-0.11, 1.11, 0.5),
    "aten.elu": _sloped(0.0, 1.0),
    "aten.selu": _sloped(0.0, 1.7581),
    "aten.sin": _smooth(-1.0, 1.0, 1.0),
    "aten.cos": _smooth(-1.0, 1.0, 1.0),
}
"""By operator name. Softplus with another ``beta``, ELU with another ``alpha`` are refused by the caller."""
