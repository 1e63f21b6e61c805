"""Spectral norms that are true upper bounds: exact for matrices, through a torus for convolutions.

Power iteration approaches a norm from below, so it is never used here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["convolution_norm", "matrix_norm", "pooling_norm"]

_SLACK = 1e-9
"""Relative allowance for the rounding of a float64 eigenvalue computation."""


def matrix_norm(matrix: Tensor) -> float:
    """Return the spectral norm of a matrix, float64, from the eigenvalues of its smaller Gram matrix."""
    values = matrix.double()
    if values.numel() == 0:
        return 0.0
    gram = values @ values.T if values.shape[0] <= values.shape[1] else values.T @ values
    return math.sqrt(max(float(torch.linalg.eigvalsh(gram)[-1]), 0.0)) * (1 + _SLACK)


def convolution_norm(
    kernel: Tensor, space: Sequence[int], *, dilation: Sequence[int], groups: int, turned: bool = False
) -> float:
    r"""Return an upper bound on the spectral norm of a zero-padded, possibly strided convolution.

    [L] On a torus the convolution is block diagonal in Fourier space, so its norm is the largest singular value
    over frequencies (Sedghi, Gupta and Long 2019). [O] A zero-padded convolution on ``space`` is a restriction of
    the circular one on the torus enlarged by the kernel's reach, and striding drops outputs; both only lower
    the norm. A transposed convolution is the adjoint of a convolution.

    Args:
        kernel: weights ``(out, in / groups, *kernel)``; for ``turned``, ``(in, out / groups, *kernel)``.
        space: lengths of the input (for ``turned``, of the output) in space.
        dilation: distance between kernel positions.
        groups: number of channel groups.
        turned: whether the convolution is transposed.

    Returns:
        The bound, float64.
    """
    weights = kernel.double()
    lengths = tuple(weights.shape[2:])
    reach = [d * (k - 1) + 1 for d, k in zip(dilation, lengths, strict=True)]
    torus = [s + r - 1 for s, r in zip(space, reach, strict=True)]
    spread = weights.new_zeros(*weights.shape[:2], *reach)
    spread[(..., *(slice(None, None, d) for d in dilation))] = weights
    dims = tuple(range(2, 2 + len(lengths)))
    waves = torch.fft.rfftn(spread, s=torus, dim=dims).flatten(2).movedim(2, 0)
    blocks = (
        waves.unflatten(1, (groups, -1)).transpose(0, 1).reshape(-1, waves.shape[1] // groups, waves.shape[2])
    )
    gram = blocks @ blocks.mH if blocks.shape[1] <= blocks.shape[2] else blocks.mH @ blocks
    return math.sqrt(max(float(torch.linalg.eigvalsh(gram).max()), 0.0)) * (1 + _SLACK)


def pooling_norm(kernel: Sequence[int], stride: Sequence[int]) -> float:
    r"""Return an upper bound on the norm of average pooling: :math:`\prod_i \sqrt{\lceil k_i/s_i \rceil / k_i}`.

    [O] Schur's test: rows sum to at most one, and each input is counted by at most ``ceil(k/s)`` windows per
    dimension with weight ``1/k`` each. Equals ``1/√k`` per dimension for windows that do not overlap.
    """
    return math.prod(math.sqrt(math.ceil(k / s) / k) for k, s in zip(kernel, stride, strict=True))
