"""Random elements of a class: what verification tries on the units of a group."""

from __future__ import annotations

import torch
from torch import Tensor

from isthmus.couplings import Coupling, Linear, Monomial, Permutation, Rotation
from isthmus.symmetry._acts import Acts

__all__ = ["random_element"]

_SPREAD = 0.5
"""Standard deviation of the logarithm of random factors, and of singular values."""


def random_element(acts: Acts, permutation: Tensor, generator: torch.Generator) -> Coupling:
    """Return a random element of a class, float64, well conditioned.

    Signs are fair coins, factors log-normal, rotations uniform (Haar measure), invertible matrices products of a
    rotation, log-normal singular values and a rotation.

    Args:
        acts: the class.
        permutation: the order of the units, where they are not mixed anyway.
        generator: source of randomness; advanced.
    """
    size = len(permutation)
    if acts is Acts.PERMUTATION:
        return Permutation.known(permutation)
    if not acts.mixes:
        factors = torch.ones(size, dtype=torch.float64)
        if acts in (Acts.SIGNED, Acts.MONOMIAL):
            factors = 1.0 - 2.0 * torch.randint(0, 2, (size,), generator=generator).double()
        if acts in (Acts.POSITIVE, Acts.MONOMIAL):
            factors = factors * _log_normal(size, generator)
        return Monomial(permutation, factors)
    if acts is Acts.MEAN_FIXING:
        return Rotation(_fixing_the_mean(size, generator))
    rotation = _haar(size, generator)
    if acts is Acts.ORTHOGONAL:
        return Rotation(rotation)
    stretched = rotation * _log_normal(size, generator)
    return Linear(stretched @ _haar(size, generator))


def _log_normal(size: int, generator: torch.Generator) -> Tensor:
    return (_SPREAD * torch.randn(size, dtype=torch.float64, generator=generator)).exp()


def _haar(size: int, generator: torch.Generator) -> Tensor:
    """Return a uniformly random orthogonal matrix (Mezzadri 2007, section 5)."""
    if size == 0:
        return torch.zeros(0, 0, dtype=torch.float64)
    basis, triangle = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64, generator=generator))
    return basis * triangle.diagonal().sign()


def _fixing_the_mean(size: int, generator: torch.Generator) -> Tensor:
    """Return a random orthogonal matrix with ``Q 1 = 1``: uniform on what is orthogonal to the mean direction."""
    mean = torch.full((size, 1), size**-0.5, dtype=torch.float64)
    others = torch.linalg.qr(torch.cat([mean, torch.eye(size, dtype=torch.float64)[:, : size - 1]], 1))[0]
    complement = others[:, 1:]
    return mean @ mean.T + complement @ _haar(size - 1, generator) @ complement.T
