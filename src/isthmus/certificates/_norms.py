r"""Spectral norms that are true upper bounds, rounding included: matrices exactly, convolutions through a torus.

Power iteration approaches a norm from below, so it is never used here. A norm is the root of the largest eigenvalue of
a Gram matrix :math:`G = A A^\top`. In floating point :math:`G` is off by at most :math:`k u \|A\|_F^2` (``k`` products
summed, ``u`` half the machine epsilon) and a symmetric eigenvalue by a small multiple of :math:`n u \|G\|` [L, Higham
2002, chapters 3 and 18; LAPACK's backward error], for which 16 ``n`` is allowed. Both are added before the root is
taken, relative to :math:`\|A\|_F^2 \ge \|G\|`; entries are divided by the largest first, so that no square overflows or
vanishes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["ROUNDOFF", "convolution_norm", "matrix_norm", "pooling_norm", "row_norms"]

ROUNDOFF = torch.finfo(torch.float64).eps / 2
"""Largest relative error of one float64 operation."""


_SMALL = 1e-140
"""Norms below this may have lost squares to underflow."""


def row_norms(values: Tensor) -> Tensor:
    """Return the Euclidean norm of everything but axis 0, shape ``(examples,)``; no square overflows or vanishes."""
    flat = values.reshape(values.shape[0], -1)
    norms = flat.norm(dim=1)
    doubtful = (norms < _SMALL) | norms.isinf()
    if flat.shape[1] and bool(doubtful.any()):
        scale = flat.abs().amax(1).clamp_min(torch.finfo(flat.dtype).tiny)
        scaled = scale * (flat / scale.unsqueeze(1)).norm(dim=1)
        norms = torch.where(doubtful, scaled, norms)
    return norms


def matrix_norm(matrix: Tensor) -> float:
    """Return the spectral norm of a matrix, float64, from the eigenvalues of its smaller Gram matrix.

    Never below the true norm, and above it by less than ``1e-8`` of it for sides up to 4096.
    """
    values = matrix.detach().double()
    if values.numel() == 0:
        return 0.0
    return _largest_norm(values.unsqueeze(0))


def _largest_norm(blocks: Tensor) -> float:
    """Return a bound on the largest spectral norm of matrices (real or complex), shape ``(count, rows, columns)``."""
    scale = float(blocks.abs().max())
    if scale == 0.0 or not math.isfinite(scale):
        return scale
    scaled = blocks / scale
    small, long = sorted(scaled.shape[1:])
    gram = scaled @ scaled.mH if scaled.shape[1] == small else scaled.mH @ scaled
    # a complex product is four real ones
    allowance = (4 * long + 16 * small + 8) * ROUNDOFF
    square = torch.linalg.eigvalsh(gram)[:, -1].clamp_min(0) + allowance * gram.diagonal(
        dim1=1, dim2=2
    ).real.sum(1)
    return scale * math.sqrt(float(square.max())) * (1 + 4 * ROUNDOFF)


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
    weights = kernel.detach().double()
    scale = float(weights.abs().max()) if weights.numel() else 0.0
    if scale == 0.0:
        return 0.0
    weights = weights / scale
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
    # every coefficient is a sum along a tree of depth log2(n), off by a few roundings per level of its absolute sum
    levels = 1 + math.log2(math.prod(torus))
    absolute = math.sqrt(math.prod(lengths)) * float(weights.norm())
    return scale * (_largest_norm(blocks) + 64 * levels * ROUNDOFF * absolute)


def pooling_norm(kernel: Sequence[int], stride: Sequence[int]) -> float:
    r"""Return an upper bound on the norm of average pooling: :math:`\prod_i \sqrt{\lceil k_i/s_i \rceil / k_i}`.

    [O] Schur's test: rows sum to at most one, and each input is counted by at most ``ceil(k/s)`` windows per
    dimension with weight ``1/k`` each. Equals ``1/√k`` per dimension for windows that do not overlap.
    """
    return math.prod(math.sqrt(math.ceil(k / s) / k) for k, s in zip(kernel, stride, strict=True))
