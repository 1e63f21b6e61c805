"""Elements of classes: of which class a coupling is, and random ones for verification."""

from __future__ import annotations

import torch
from torch import Tensor

from isthmus.couplings import Coupling, Linear, Monomial, Permutation, Rotation
from isthmus.symmetry._acts import Acts

__all__ = ["class_of", "random_element"]

_FIXED = 1e-8
"""Most that a rotation may move the direction in which all units are equal, as much as its rows may be off."""
_SPREAD = 0.5
"""Standard deviation of the logarithm of random factors, and of singular values."""


def class_of(coupling: Coupling) -> Acts | None:
    """Return the smallest class that a coupling is an element of; ``None`` for plans and nested couplings."""
    if isinstance(coupling, Permutation):
        return Acts.PERMUTATION
    if isinstance(coupling, Monomial):
        sizes = coupling.factors.detach().abs()
        unit, positive = bool((sizes == 1).all()), bool((coupling.factors > 0).all())
        if unit and positive:
            return Acts.PERMUTATION
        return Acts.SIGNED if unit else Acts.POSITIVE if positive else Acts.MONOMIAL
    if isinstance(coupling, Rotation):
        moved = coupling.values.detach().sum(1) - 1
        fixing = len(moved) == 0 or float(moved.abs().max()) < _FIXED
        return Acts.MEAN_FIXING if fixing else Acts.ORTHOGONAL
    return Acts.GENERAL if isinstance(coupling, Linear) else None


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
