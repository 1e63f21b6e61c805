r"""Products in a short precision, and how far they can be from the exact ones.

Rows are cut into blocks of :math:`k \le 256` entries whose products are added up one after the other. Whatever the
order of summation within a block, entry :math:`(i, j)` of ``a @ b.T`` is off by at most
:math:`\alpha\,\lVert a_i\rVert\,\lVert b_j\rVert` (Higham 2002, section 3.1, with Cauchy and Schwarz), and each
block that is added rounds the running total once more, by :math:`u = 2^{-24}` of its size. With
:math:`\gamma_k = k u / (1 - k u)`,

- float32: :math:`\alpha = \gamma_k`, and :math:`2u` more where the entries had to be rounded to float32;
- bfloat16, :math:`\beta = 2^{-8}`: entries and the products of blocks are rounded to eight bits, sums within a block
  are kept in float32, so :math:`\alpha = (1 + \beta)^3 (1 + \gamma_k) - 1`.

The blocks make the bound eight times smaller for rows of 2048 and cost nothing measurable. Underflow is not covered:
rows of norms below about :math:`10^{-19}` have gains that vanish in float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["SHORT", "add_product", "blocks", "product_error", "rounding_of"]

SHORT = 2.0**-24
"""Unit roundoff of float32, in which products are added up."""
_BFLOAT16 = 2.0**-8
_BLOCK = 256


def product_error(length: int, dtype: torch.dtype, source: torch.dtype) -> float:
    """Return the bound on the error of one entry of a product, relative to the norms of its rows.

    Not counted is the rounding of the total to which the blocks are added.

    Args:
        length: of the rows.
        dtype: float32 or bfloat16, in which the product is formed.
        source: dtype of the entries before.
    """
    block = min(length, _BLOCK) * SHORT
    sums = block / (1 - block)
    if dtype == torch.bfloat16 or torch.get_float32_matmul_precision() != "highest":
        return (1 + _BFLOAT16) ** 3 * (1 + sums) - 1
    return sums + (2 * SHORT if source == torch.float64 else 0.0)


def blocks(length: int) -> int:
    """Return into how many blocks rows are cut."""
    return -(-length // _BLOCK)


def rounding_of(values: float) -> float:
    """Return the rounding of sums in float32 of values of this size."""
    return 4 * SHORT * values


def add_product(total: Tensor, a: Tensor, b: Tensor, dtype: torch.dtype) -> None:
    """Add ``a @ b.T`` to a float32 matrix in place."""
    for x, y in zip(a.split(_BLOCK, 1), b.split(_BLOCK, 1), strict=True):
        if dtype == torch.float32:
            total.addmm_(x, y.T)
        else:
            total += (x.to(dtype) @ y.to(dtype).T).float()
