r"""Elements of the continuous part of a network's group, and how they move.

Every group of units has one element: positive factors :math:`\lambda = e^x`, a rotation :math:`Q`, or an invertible map
:math:`M`. It begins at the identity and moves by :math:`M \leftarrow e^{T} M`, where :math:`T` is a tangent: a diagonal
for factors, :math:`X - X^\top` for rotations (with both sides projected off the ones where these stay fixed), any
matrix for maps. At :math:`T = 0` the derivative of :math:`e^T` is that of :math:`1 + T`, so a gradient costs two
products of matrices and no exponential, and a rotation stays one to rounding however far it goes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from isthmus.couplings import Coupling, Linear, Monomial, Rotation
from isthmus.symmetry import Acts

__all__ = ["Elements"]

MOST_FACTOR = 1e4
"""Largest factor of a unit, and the inverse of the smallest: float32 keeps the function beyond it, but not its sums."""
MOST_CONDITION = 1e4
"""Condition number, in the Frobenius norm and by the size of the map, that an invertible map never passes."""


class Movable(Protocol):
    """The elements of several groups that move alike."""

    tangent: Tensor
    """What is learnt, float64; zero between moves."""

    def couplings(self, dtype: torch.dtype) -> dict[str, Coupling]:
        """Return the elements by group, differentiable by the tangent, in the dtype of the network."""
        ...

    def move(self) -> None:
        """Take the tangent into the elements, and leave it zero."""
        ...

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors that the elements are kept in."""
        ...

    def values(self) -> dict[str, Coupling]:
        """Return the elements by group, float64, checked."""
        ...


class LearntFactors:
    """Positive factors of the units of several groups.

    Args:
        sizes: number of units by group.
        device: of the network.
    """

    def __init__(self, sizes: Mapping[str, int], device: torch.device) -> None:
        self.sizes = dict(sizes)
        self._orders = {name: torch.arange(size) for name, size in sizes.items()}
        self.logs = torch.zeros(sum(sizes.values()), dtype=torch.float64, device=device)
        self.tangent = torch.zeros_like(self.logs).requires_grad_()

    def couplings(self, dtype: torch.dtype) -> dict[str, Coupling]:
        """Return factors ``exp(x + T)`` by group."""
        factors = (self.logs + self.tangent).exp().to(dtype).split([*self.sizes.values()])
        pairs = zip(self._orders.items(), factors, strict=True)
        return {name: Monomial.known(order, own) for (name, order), own in pairs}

    def move(self) -> None:
        """Add the tangent to the logarithms."""
        most = float(torch.tensor(MOST_FACTOR).log())
        with torch.no_grad():
            self.logs = (self.logs + self.tangent).clamp(-most, most)
            self.tangent.zero_()

    def tensors(self) -> dict[str, Tensor]:
        """Return the logarithms."""
        return {"logs": self.logs}

    def values(self) -> dict[str, Coupling]:
        """Return the factors by group."""
        parts = self.logs.exp().cpu().split([*self.sizes.values()])
        return {n: Monomial(self._orders[n], own.clone()) for n, own in zip(self.sizes, parts, strict=True)}


class Mixtures:
    """Rotations or invertible maps of groups of one size.

    Args:
        names: of the groups.
        size: number of units of each.
        acts: their class.
        device: of the network.
    """

    def __init__(self, names: Iterable[str], size: int, acts: Acts, device: torch.device) -> None:
        self.names, self.size, self.acts = tuple(names), size, acts
        self.matrices = torch.eye(size, dtype=torch.float64, device=device).repeat(len(self.names), 1, 1)
        self.undone = self.matrices.clone()
        self.tangent = torch.zeros_like(self.matrices).requires_grad_()

    def couplings(self, dtype: torch.dtype) -> dict[str, Coupling]:
        """Return ``(1 + T) M`` by group, with ``M⁻¹ (1 - T)`` as its inverse, which is that to first order."""
        direction = self._direction().to(dtype)
        matrices = self.matrices.to(dtype)
        moved = matrices + direction @ matrices
        if self.acts is not Acts.GENERAL:
            return {name: Rotation.known(own) for name, own in zip(self.names, moved, strict=True)}
        undone = self.undone.to(dtype)
        back = undone - undone @ direction
        return {n: Linear.known(m, u) for n, m, u in zip(self.names, moved, back, strict=True)}

    def _direction(self) -> Tensor:
        """Return the tangent as an element of the class's algebra."""
        if self.acts is Acts.GENERAL:
            return self.tangent
        skew = self.tangent - self.tangent.mT
        if self.acts is Acts.MEAN_FIXING:
            skew = skew - skew.mean(-1, keepdim=True)
            skew = skew - skew.mean(-2, keepdim=True)
        return skew

    def move(self) -> None:
        """Multiply by the exponential of the tangent; maps that would get too badly conditioned stay."""
        with torch.no_grad():
            direction = self._direction()
            matrices = torch.matrix_exp(direction) @ self.matrices
            undone = matrices.mT
            if self.acts is Acts.GENERAL:
                undone = self.undone @ torch.matrix_exp(-direction)
                condition = matrices.flatten(1).norm(dim=1) * undone.flatten(1).norm(dim=1) / self.size
                kept = (condition > MOST_CONDITION)[:, None, None]
                matrices = torch.where(kept, self.matrices, matrices)
                undone = torch.where(kept, self.undone, undone)
            self.matrices, self.undone = matrices, undone
            self.tangent.zero_()

    def tensors(self) -> dict[str, Tensor]:
        """Return the matrices and their inverses."""
        return {"matrices": self.matrices, "undone": self.undone}

    def values(self) -> dict[str, Coupling]:
        """Return the matrices by group; rotations as the nearest ones, which they are to rounding."""
        if self.acts is Acts.GENERAL:
            return {
                n: Linear(m.cpu().clone(), _inverse(m.cpu(), u.cpu()))
                for n, m, u in zip(self.names, self.matrices, self.undone, strict=True)
            }
        left, _, right = torch.linalg.svd(self.matrices.cpu())
        return {n: Rotation(own) for n, own in zip(self.names, left @ right, strict=True)}


def _inverse(matrix: Tensor, near: Tensor) -> Tensor:
    """Return the inverse of a matrix from one that is nearly it, by a step of Newton's method."""
    return near @ (2 * torch.eye(len(matrix), dtype=matrix.dtype) - matrix @ near)


@dataclass(frozen=True, eq=False)
class Elements:
    """One element of the continuous part of every group's class; groups without such a part have none.

    Attributes:
        parts: by a name that says what they are.
    """

    parts: Mapping[str, Movable]

    @classmethod
    def of(cls, classes: Mapping[str, Acts], sizes: Mapping[str, int], device: torch.device) -> Elements:
        """Return identities.

        Args:
            classes: by group.
            sizes: number of units by group.
            device: of the network.
        """
        parts: dict[str, Movable] = {}
        scaled = {n: sizes[n] for n, acts in classes.items() if acts in (Acts.POSITIVE, Acts.MONOMIAL)}
        if scaled:
            parts["factors"] = LearntFactors(scaled, device)
        mixed: dict[tuple[Acts, int], list[str]] = {}
        for name, acts in classes.items():
            # A rotation of one unit is a sign, and one of two that fixes the mean an exchange; pairs are not learnt.
            fewest = {Acts.GENERAL: 1, Acts.ORTHOGONAL: 2, Acts.MEAN_FIXING: 3}.get(acts)
            if fewest is not None and sizes[name] >= fewest:
                mixed.setdefault((acts, sizes[name]), []).append(name)
        for (acts, size), names in mixed.items():
            parts[f"{acts}.{size}"] = Mixtures(names, size, acts, device)
        return cls(parts)

    @property
    def tangents(self) -> list[Tensor]:
        """What is learnt: leaves, float64."""
        return [part.tangent for part in self.parts.values()]

    def __bool__(self) -> bool:
        """Whether there is anything to learn."""
        return bool(self.parts)

    def couplings(self, dtype: torch.dtype) -> dict[str, Coupling]:
        """Return the elements by group, differentiable by the tangents."""
        return {n: c for part in self.parts.values() for n, c in part.couplings(dtype).items()}

    def move(self) -> None:
        """Take the tangents into the elements."""
        for part in self.parts.values():
            part.move()

    def values(self) -> dict[str, Coupling]:
        """Return the elements by group, float64 on the CPU, checked."""
        return {n: c for part in self.parts.values() for n, c in part.values().items()}

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors of all parts, by names that :meth:`put` knows."""
        return {f"{name}.{k}": t for name, part in self.parts.items() for k, t in part.tensors().items()}

    def put(self, tensors: Mapping[str, Tensor]) -> None:
        """Take elements that :meth:`tensors` once returned."""
        for name, part in self.parts.items():
            for key, own in part.tensors().items():
                setattr(part, key, tensors[f"{name}.{key}"].to(own))
