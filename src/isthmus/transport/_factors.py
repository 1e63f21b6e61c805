r"""The factor that brings one unit closest to another, for all pairs of units at once.

A unit of B may be multiplied by :math:`\lambda` where tensors hold it, if they are divided by it where they read it.
For a pair with holders :math:`a, b` and readers :math:`r, s` the squared distance is

.. math:: \lvert a - \lambda b\rvert^2 + \lvert r - s/\lambda \rvert^2
          = \text{const} - 2 \lambda p + \lambda^2 n - 2 q / \lambda + m / \lambda^2 ,
          \qquad p = \langle a, b\rangle,\; q = \langle r, s\rangle,\; n = \lvert b\rvert^2,\; m = \lvert s\rvert^2 .

With :math:`\lambda = (m/n)^{1/4} e^x`, :math:`P = p\, m^{-1/4} n^{-3/4}` and :math:`Q = q\, m^{-3/4} n^{-1/4}` half of
it, in units of :math:`\sqrt{nm}`, is :math:`\cosh 2x - (P + Q) \cosh x - (P - Q) \sinh x`. Its least value lies on the
side of the sign of :math:`P - Q`, and there the derivative has one root: with :math:`s = \sinh \lvert x\rvert`,
:math:`c = \cosh x`, :math:`S = P + Q` and :math:`D = \lvert P - Q\rvert` it is the root of
:math:`\psi(s) = 4 s - S s / c - D`, which is convex for :math:`S > 0` and concave and rising otherwise. Newton's method
falls to it from :math:`(S + D)/4`, or rises to it from 0, and cannot miss it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["gain_of_factors", "least_squares_factors", "norm_factors"]

_STEPS = 64
_LEAST_SLOPE = 1e-9
"""Where a root is triple (P + Q = 4, P = Q) slopes vanish with the distance; shorter steps serve as well."""


def least_squares_factors(
    holders: Tensor,
    readers: Tensor,
    norms: tuple[Tensor, Tensor],
    *,
    signed: bool = False,
    most: float = math.inf,
) -> Tensor:
    r"""Return, for each pair of units, the factor on B's unit that makes their squared distance least.

    Args:
        holders: inner products :math:`p` of what holds the units, float64, shape ``(units of A, units of B)``.
        readers: inner products :math:`q` of what reads them, same shape.
        norms: squared norms :math:`n` and :math:`m` of B's holders and readers, each ``(units of B,)``.
        signed: whether factors may be negative; of two that are equally good the positive one is taken.
        most: largest factor; its inverse is the least one.

    Returns:
        Factors, same shape as ``holders``. A unit of B without holders and readers keeps its size.

    Notes:
        Exact to rounding, bounds included: the best of all factors within them. Without bounds a pair that nothing
        holds, or nothing reads, may have no best factor, and gets zero or infinity.

    Source:
        Ours; the cost is that of Ainsworth et al. 2023 with one more unknown.
    """
    found = _positive(holders, readers, norms, most)
    if not signed:
        return found
    other = -_positive(-holders, -readers, norms, most)
    better = gain_of_factors(other, holders, readers, norms) > gain_of_factors(found, holders, readers, norms)
    return torch.where(better, other, found)


def norm_factors(
    norms_a: tuple[Tensor, Tensor], norms_b: tuple[Tensor, Tensor], *, most: float = math.inf
) -> Tensor:
    r"""Return, for each pair of units, the positive factor that brings their norms closest.

    .. math:: \lambda^2 = \frac{\lvert a\rvert \lvert s\rvert}{\lvert b\rvert \lvert r\rvert}

    the geometric mean of what the holders and the readers ask for: least squares in the logarithms of the norms. Where
    one of the two is missing (a norm of zero in either network), the other decides; without both the factor is one.

    Args:
        norms_a: squared norms of A's holders :math:`a` and readers :math:`r`, each ``(units of A,)``.
        norms_b: squared norms of B's holders :math:`b` and readers :math:`s`, each ``(units of B,)``.
        most: largest factor; its inverse is the least one.

    Returns:
        Factors, float64, shape ``(units of A, units of B)``.

    Source:
        SEA (OpenReview vl4iv7siTg), whose abstract has the geometric mean of the units' weight norms as the best
        scales; the treatment of missing sides is ours.
    """
    hold, read = (_log_ratio(a, b) for a, b in zip(norms_a, norms_b, strict=True))
    total = torch.nan_to_num(hold, 0.0) - torch.nan_to_num(read, 0.0)
    sides = (~hold.isnan()).double() + (~read.isnan()).double()
    # Norms are squared, which halves the logarithm once; with both sides the mean halves it again.
    bound = math.log(most)
    return (total / (2 * sides).clamp(min=1.0)).clamp(-bound, bound).exp()


def gain_of_factors(
    factors: Tensor, holders: Tensor, readers: Tensor, norms: tuple[Tensor, Tensor]
) -> Tensor:
    r"""Return minus half the squared distance of each pair under given factors, without A's own norms.

    .. math:: \lambda p + q/\lambda - \tfrac12 (\lambda^2 n + m / \lambda^2)
    """
    grown, shrunk = norms
    return (
        factors * holders + readers / factors - 0.5 * (factors.square() * grown + shrunk / factors.square())
    )


def _log_ratio(a: Tensor, b: Tensor) -> Tensor:
    """Return the logarithms of ratios of squared norms, NaN where one is zero."""
    both = (a[:, None] > 0) & (b[None, :] > 0)
    return torch.where(
        both, a.clamp(min=1e-300).log()[:, None] - b.clamp(min=1e-300).log()[None, :], math.nan
    )


def _positive(holders: Tensor, readers: Tensor, norms: tuple[Tensor, Tensor], most: float) -> Tensor:
    """Return the best positive factors within the bounds."""
    n, m = (x.expand_as(holders) for x in norms)
    both = (n > 0) & (m > 0)
    one = torch.ones_like(holders)
    n, m = torch.where(both, n, one), torch.where(both, m, one)
    unit = (m / n) ** 0.25  # the factor that balances the unit's own norms
    p, q = holders / (m**0.25 * n**0.75), readers / (m**0.75 * n**0.25)
    best = unit * _stationary(p, q, far=False)
    found = torch.where(both, best, _one_sided(holders, readers, norms))
    if most == math.inf:
        return found
    outside = both & ((best > most) | (best < 1 / most))
    found = found.clamp(1 / most, most)
    if not bool(outside.any()):
        return found
    other = (unit * _stationary(p, q, far=True)).clamp(1 / most, most)
    full = (norms[0].expand_as(holders), norms[1].expand_as(holders))
    for choice in (other, torch.full_like(found, most), torch.full_like(found, 1 / most)):
        better = gain_of_factors(choice, holders, readers, full) > gain_of_factors(
            found, holders, readers, full
        )
        found = torch.where(outside & better, choice, found)
    return found


def _one_sided(holders: Tensor, readers: Tensor, norms: tuple[Tensor, Tensor]) -> Tensor:
    """Return the best factors where holders or readers are zero: plain regression on the other side."""
    n, m = (x.expand_as(holders) for x in norms)
    grown = holders.clamp(min=0.0) / torch.where(n > 0, n, 1.0)
    shrunk = torch.where(m > 0, m, 1.0) / readers.clamp(min=0.0)
    return torch.where(n > 0, grown, torch.where(m > 0, shrunk, 1.0))


def _stationary(p: Tensor, q: Tensor, *, far: bool) -> Tensor:
    """Return the exponential of the best ``x``, or of the lesser valley on the other side of 0 (or a point near it)."""
    total, lean = p + q, p - q
    distance = lean.abs()
    if far:
        # ψ with -D: where it has no root, its least point stands for one, and its gain will not be the best.
        least = ((total / 4).clamp(min=1.0) ** (2 / 3) - 1).sqrt()
        root = _newton((total / 4).clamp(min=0.0), total, -distance, least)
        lean = -torch.where(lean == 0, 1.0, lean)
    else:
        start = torch.where(total > 0, (total + distance) / 4, 0.0)
        root = _newton(start, total, distance, torch.zeros_like(start))
    grown = root + (1 + root.square()).sqrt()
    return torch.where(lean < 0, 1 / grown, grown)


def _newton(root: Tensor, total: Tensor, distance: Tensor, least: Tensor) -> Tensor:
    """Return where ``4 s - S s / c - D`` vanishes, from a start from which the way there is monotone."""
    for _ in range(_STEPS):
        cosh = (1 + root.square()).sqrt()
        slope = (4 - total / cosh**3).clamp(min=_LEAST_SLOPE)
        moved = torch.maximum(root - (4 * root - total * root / cosh - distance) / slope, least)
        step = (moved - root).abs()
        root = moved
        if not bool((step > 1e-14 * (1 + root)).any()):
            break
    return root
