r"""Activations a certificate knows: their slopes, their curvature, and how far they stray from a chord.

For an activation :math:`\sigma` and endpoint pre-activations :math:`a, b` the Jensen gap is
:math:`J(t) = \sigma((1-t)a + tb) - (1-t)\sigma(a) - t\sigma(b)`. With slopes in :math:`[\alpha, \beta]`, secant slope
:math:`s = (\sigma(b) - \sigma(a)) / (b - a)` and :math:`|\sigma''| \le M_2`,

.. math:: \sup_t |J| \le \min\Bigl\{ \frac{(\beta - s)(s - \alpha)}{\beta - \alpha}\,|a-b|,\;
    \tfrac{M_2}{8}\,(a-b)^2 \Bigr\} .

[O] The first is the height of the parallelogram of slopes :math:`\alpha, \beta` that holds every such function through
its two ends: no bound from slopes and ends alone is smaller. It is exact for one kink (for ReLU it is
:math:`|ab|/(|a|+|b|)` where the signs differ), vanishes where both ends are saturated or both on a linear part, and is
at most :math:`\tfrac{\beta-\alpha}4|a-b|`, its value at the worst slope. The second is Taylor's (Theory, section 3.2).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["ACTIVATIONS", "Activation", "kink_gap", "slope_gap"]

Given = Mapping[str, Any]


def kink_gap(a: Tensor, b: Tensor) -> Tensor:
    r"""Return the exact gap of ReLU, :math:`|ab|/(|a|+|b|)` where the signs differ, else zero."""
    sizes = a.abs(), b.abs()
    low, high = torch.minimum(*sizes), torch.maximum(*sizes)
    # dividing first: the product of two small numbers would vanish, that of two large ones overflow
    gap = low.mul_(high.div_((sizes[0] + sizes[1]).clamp_min_(torch.finfo(a.dtype).tiny)))
    return torch.where(a.sign() * b.sign() < 0, gap, 0.0)


def slope_gap(before: Tensor, after: Tensor, low: float, high: float) -> Tensor:
    """Return the height of the parallelogram over a step ``before`` that the function maps to ``after``."""
    if low == high:
        return torch.zeros_like(before)
    down = (before.sign() * (high * before - after)).clamp_min_(0)
    up = (before.sign() * (after - low * before)).clamp_min_(0)
    # a product of two factors whose sum is (high - low) |before|: dividing first keeps it from overflowing
    return down.mul_(up.div_(((high - low) * before.abs()).clamp_min_(torch.finfo(before.dtype).tiny)))


def _never(_: Given) -> str:
    return ""


def _smooth_everywhere(_: Given) -> float:
    return 0.0


@dataclass(frozen=True)
class Activation:
    """An elementwise function; every attribute is a function of the arguments of the operator's node.

    Attributes:
        slopes: least and largest slope.
        curvature: bound on the second derivative, infinite where there are kinks.
        one_kink: whether the function consists of two half lines that meet at zero (slope 1 on the right).
        jump: largest distance of what is computed from a function with these slopes (softplus becomes linear from
            its threshold on, with a jump).
        refused: why the arguments are out of scope, empty if they are not.
    """

    slopes: Callable[[Given], tuple[float, float]]
    curvature: Callable[[Given], float]
    one_kink: bool = False
    jump: Callable[[Given], float] = _smooth_everywhere
    refused: Callable[[Given], str] = _never

    def lipschitz(self, given: Given) -> float:
        """Return the largest absolute slope."""
        return max(abs(slope) for slope in self.slopes(given))

    def gap(self, a: Tensor, b: Tensor, at_a: Tensor, at_b: Tensor, given: Given) -> Tensor:
        """Return a bound on the gap of every unit, from its arguments ``a, b`` and values ``at_a, at_b``."""
        low, high = self.slopes(given)
        if self.one_kink:
            return (high - low) * kink_gap(a, b)
        before = b - a
        gap, curvature = slope_gap(before, at_b - at_a, low, high), self.curvature(given)
        if not math.isinf(curvature):
            gap = torch.minimum(gap, curvature / 8 * before.square())
        return gap + 2 * self.jump(given)


def _smooth(low: float, high: float, curvature: float) -> Activation:
    return Activation(lambda _: (low, high), lambda _: curvature)


def _sloped(low: float, high: float) -> Activation:
    return _smooth(low, high, math.inf)


def _kinked(slope: Callable[[Given], float]) -> Activation:
    def slopes(given: Given) -> tuple[float, float]:
        return min(1.0, slope(given)), max(1.0, slope(given))

    return Activation(slopes, lambda _: math.inf, one_kink=True)


def _elu(given: Given) -> tuple[float, float]:
    """Return the slopes of ``scale x`` for positive x and of ``scale alpha (exp(input_scale x) - 1)`` else."""
    right = float(given["scale"])
    steepest = right * float(given["alpha"]) * float(given["input_scale"])
    return min(0.0, right, steepest), max(0.0, right, steepest)


def _positive(*names: str) -> Callable[[Given], str]:
    def check(given: Given) -> str:
        wrong = [name for name in names if not float(given[name]) > 0]
        return f"{wrong[0]} must be above 0" if wrong else ""

    return check


_SOFTPLUS = Activation(
    lambda _: (0.0, 1.0),
    lambda given: float(given["beta"]) / 4,
    jump=lambda given: float(np.logaddexp(0.0, -float(given["threshold"]))) / float(given["beta"]),
    refused=_positive("beta"),
)

ACTIVATIONS: Mapping[str, Activation] = {
    "aten.relu": _kinked(lambda _: 0.0),
    "aten.leaky_relu": _kinked(lambda given: float(given["negative_slope"])),
    "aten.rrelu": _kinked(lambda given: (float(given["lower"]) + float(given["upper"])) / 2),
    "aten.abs": _kinked(lambda _: -1.0),
    "aten.relu6": _sloped(0.0, 1.0),
    "aten.hardtanh": _sloped(0.0, 1.0),
    "aten.clamp": _sloped(0.0, 1.0),
    "aten.clamp_min": _sloped(0.0, 1.0),
    "aten.clamp_max": _sloped(0.0, 1.0),
    "aten.hardsigmoid": _sloped(0.0, 1 / 6),
    "aten.hardswish": _sloped(-0.5, 1.5),
    # slopes and largest |second derivative|; values rounded outwards
    "aten.tanh": _smooth(0.0, 1.0, 4 / (3 * math.sqrt(3)) + 1e-12),
    "aten.sigmoid": _smooth(0.0, 0.25, 1 / (6 * math.sqrt(3)) + 1e-12),
    "aten.log_sigmoid": _smooth(0.0, 1.0, 0.25),
    "aten.softplus": _SOFTPLUS,
    "aten.gelu": _smooth(-0.14, 1.14, 0.80),
    "aten.silu": _smooth(-0.11, 1.11, 0.5),
    "aten.mish": _smooth(-0.12, 1.09, 0.65),
    "aten.elu": Activation(_elu, lambda _: math.inf, refused=_positive("input_scale")),
    "aten.celu": Activation(lambda _: (0.0, 1.0), lambda _: math.inf, refused=_positive("alpha")),
    "aten.selu": _sloped(0.0, 1.7581),
    "aten.erf": _smooth(0.0, 2 / math.sqrt(math.pi) + 1e-12, 0.968),
    "aten.sin": _smooth(-1.0, 1.0, 1.0),
    "aten.cos": _smooth(-1.0, 1.0, 1.0),
}
"""By operator name."""
