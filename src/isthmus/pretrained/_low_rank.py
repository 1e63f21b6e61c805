r"""Averages of low-rank products :math:`B A`, whose factors have a general group of their own.

:math:`B A = (B M)(M^{-1} A)` for every invertible :math:`M`, so the factors of two trainings share no labels. All sums
are over matrices of the ranks: a product is never written out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

import torch
from torch import Tensor

from isthmus.transport import procrustes

__all__ = ["WAYS", "LowRank", "AdapterWay", "averaged_products", "mean_of"]

AdapterWay = Literal["svd", "aligned", "as they are"]
WAYS: Mapping[AdapterWay, str] = MappingProxyType(
    {
        "svd": "the mean of the products, cut to their rank by a singular value decomposition",
        "aligned": "balanced factors, rotated towards the first one's, then averaged",
        "as they are": "the factors averaged as they are stored",
    }
)
"""How products are averaged."""


@dataclass(frozen=True, eq=False)
class LowRank:
    """A product ``outer @ inner`` of low rank.

    Attributes:
        outer: float64, shape ``(outputs, rank)``.
        inner: float64, shape ``(rank, inputs)``.
    """

    outer: Tensor
    inner: Tensor

    def norm(self) -> float:
        """Return the Frobenius norm of the product."""
        return float(torch.linalg.matrix_norm(_core(self)[1]))

    def cut(self, rank: int) -> LowRank:
        """Return the nearest product of a rank (Eckart and Young 1936), with balanced factors.

        Where the product's rank is smaller the rest of the factors is zero.
        """
        left, core, right = _core(self)
        found_left, sizes, found_right = torch.linalg.svd(core, full_matrices=False)
        kept = min(rank, len(sizes))
        roots = sizes[:kept].sqrt()
        outer, inner = (left @ found_left[:, :kept]) * roots, roots[:, None] * (found_right[:kept] @ right)
        missing = rank - kept
        return LowRank(
            torch.nn.functional.pad(outer, (0, missing)), torch.nn.functional.pad(inner, (0, 0, 0, missing))
        )


def _core(product: LowRank) -> tuple[Tensor, Tensor, Tensor]:
    """Return orthonormal columns, a small matrix, and orthonormal rows, which multiply to the product."""
    left, above = torch.linalg.qr(product.outer)
    right, below = torch.linalg.qr(product.inner.T)
    return left, above @ below.T, right.T


def averaged_products(
    products: Sequence[LowRank], shares: Sequence[float], way: AdapterWay
) -> tuple[LowRank, dict[AdapterWay, float]]:
    r"""Average products of one rank, and say how far each way is from the mean of the products.

    Args:
        products: all of one shape and rank.
        shares: their weights, which add up to one.
        way: which average is returned.

    Returns:
        The average, and for every way :math:`\lvert \bar B \bar A - \sum_k w_k B_k A_k \rvert / \lvert \sum_k w_k B_k
        A_k \rvert` in the Frobenius norm (0 where both vanish).

    Source:
        Eckart and Young 1936: no average of this rank is nearer to the mean than ``"svd"``. Balancing and Procrustes
        are those of :class:`isthmus.matching.BalancedProcrustes`, on the factors themselves.
    """
    rank = products[0].inner.shape[0]
    mean = mean_of(products, shares)
    balanced = [p.cut(rank) for p in products]
    turned = [balanced[0], *(_towards(balanced[0], other) for other in balanced[1:])]
    found: dict[AdapterWay, LowRank] = {
        "svd": mean.cut(rank),
        "aligned": _factors_averaged(turned, shares),
        "as they are": _factors_averaged(products, shares),
    }
    size = mean.norm()
    errors: dict[AdapterWay, float] = {
        name: _distance(average, mean) / size if size else 0.0 for name, average in found.items()
    }
    return found[way], errors


def mean_of(products: Sequence[LowRank], shares: Sequence[float]) -> LowRank:
    """Return the mean of products, of their ranks together."""
    outer = torch.cat([share * p.outer for share, p in zip(shares, products, strict=True)], 1)
    return LowRank(outer, torch.cat([p.inner for p in products]))


def _towards(first: LowRank, other: LowRank) -> LowRank:
    """Return a product with its balanced factors rotated towards another one's; the product stays."""
    turned = procrustes(first.inner @ other.inner.T + first.outer.T @ other.outer)
    return LowRank(other.outer @ turned.T, turned @ other.inner)


def _factors_averaged(products: Sequence[LowRank], shares: Sequence[float]) -> LowRank:
    pairs = list(zip(shares, products, strict=True))
    return LowRank(_sum([s * p.outer for s, p in pairs]), _sum([s * p.inner for s, p in pairs]))


def _sum(tensors: Sequence[Tensor]) -> Tensor:
    """Return the sum of tensors."""
    return torch.stack(list(tensors)).sum(0)


def _distance(one: LowRank, two: LowRank) -> float:
    """Return the Frobenius norm of the difference of two products."""
    return LowRank(torch.cat([one.outer, -two.outer], 1), torch.cat([one.inner, two.inner])).norm()
