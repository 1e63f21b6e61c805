"""Elements of classes: of which class a coupling is, and random ones for verification."""

from __future__ import annotations

import torch
from torch import Tensor

from isthmus.couplings import Coupling, Linear, Monomial, Permutation, Rotation
from isthmus.symmetry._acts import Acts
from isthmus.symmetry._slots import Planes

__all__ = ["class_of", "is_of_pairs", "random_element"]

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


def is_of_pairs(acts: Acts, coupling: Coupling, pairs: Tensor) -> bool:
    """Return whether a coupling multiplies every pair of units by a complex number, of size 1 for rotations.

    Args:
        acts: rotations of pairs, or complex factors.
        coupling: any.
        pairs: the two units of each pair, shape ``(pairs, 2)``, all of them.
    """
    matrix = coupling.matrix().detach().double().cpu()
    order = pairs.T.reshape(-1)
    number = len(pairs)
    parts = matrix[order][:, order].reshape(2, number, 2, number).permute(0, 2, 1, 3)
    diagonal = parts.diagonal(dim1=2, dim2=3)
    bound = _FIXED * float(matrix.abs().max()) if number else 0.0
    others = parts - torch.diag_embed(diagonal)
    same = (diagonal[0, 0] - diagonal[1, 1]).abs(), (diagonal[0, 1] + diagonal[1, 0]).abs()
    off = [t.max() for t in (others.abs(), *same) if t.numel()]
    if acts is Acts.PLANE_ROTATIONS and number:
        off.append(((diagonal[0, 0] ** 2 + diagonal[1, 0] ** 2).sqrt() - 1).abs().max())
    return all(float(t) <= bound for t in off)


def random_element(
    acts: Acts, permutation: Tensor, generator: torch.Generator, planes: Planes = ""
) -> Coupling:
    """Return a random element of a class, float64, well conditioned.

    Signs are fair coins, factors log-normal, rotations uniform (Haar measure), invertible matrices products of a
    rotation, log-normal singular values and a rotation.

    Args:
        acts: the class.
        permutation: the order of the units, where they are not mixed anyway.
        generator: source of randomness; advanced.
        planes: which units make a pair, where pairs are acted on; they turn by uniformly random angles.
    """
    size = len(permutation)
    if acts.pairs:
        return _of_pairs(acts, size, planes, generator)
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


def _of_pairs(acts: Acts, size: int, planes: Planes, generator: torch.Generator) -> Coupling:
    angles = 2 * torch.pi * torch.rand(size // 2, dtype=torch.float64, generator=generator)
    blocks = torch.diag_embed(torch.stack([angles.cos(), -angles.sin(), angles.sin(), angles.cos()]))
    turn = blocks.reshape(2, 2, size // 2, size // 2).permute(0, 2, 1, 3)  # units half of all apart
    turn = turn if planes == "halves" else turn.permute(1, 0, 3, 2)
    matrix = turn.reshape(size, size)
    if acts is Acts.PLANE_ROTATIONS:
        return Rotation(matrix)
    factors = _log_normal(size // 2, generator)
    return Linear(matrix * (factors.repeat(2) if planes == "halves" else factors.repeat_interleave(2)))


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
