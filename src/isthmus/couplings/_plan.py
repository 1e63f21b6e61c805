"""Couplings of different numbers of units, and soft ones: transport plans."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Never

import torch
from torch import Tensor

from isthmus.couplings._coupling import Coupling, along, check_units, follow
from isthmus.errors import ShapeError

__all__ = ["Plan"]


@dataclass(frozen=True, eq=False, repr=False)
class Plan:
    r"""A transport plan between the units of A and those of B, which may be soft and rectangular.

    A unit of A becomes the average of the units of B that send mass to it; what read a unit of B is shared out among
    the units of A that it sends mass to. Where units of B are copied (one unit of B for several of A) that changes
    nothing; where they are joined or mixed it is an approximation, and nothing undoes it.

    Attributes:
        mass: :math:`\pi_{ik} \ge 0` between unit ``i`` of A and ``k`` of B, float64, shape ``(units of A, units
            of B)``, no row and no column without mass; gradients pass.

    Raises:
        ShapeError: no matrix, negative or infinite mass, or a unit without any.

    Source:
        Singh and Jaggi 2020, section 4 (OT fusion), for equal marginals.
    """

    mass: Tensor

    def __post_init__(self) -> None:
        """Check the mass."""
        mass = torch.as_tensor(self.mass)
        if mass.ndim != 2 or mass.is_complex() or not bool((torch.isfinite(mass) & (mass >= 0)).all()):
            raise ShapeError(
                f"Plan: expected a matrix of mass, finite and not negative, found shape {tuple(mass.shape)} of "
                f"{mass.dtype}."
            )
        mass = mass.double()
        for axis, whose in ((1, "A"), (0, "B")):
            empty = torch.nonzero(mass.detach().sum(axis) == 0).flatten()
            if len(empty):
                raise ShapeError(
                    f"Plan: unit {int(empty[0])} of {whose} has no mass, so it has no partner. Leave such units out, "
                    "or give them some."
                )
        object.__setattr__(self, "mass", mass)

    @property
    def shape(self) -> tuple[int, int]:
        """Number of units of A and of B."""
        return self.mass.shape[0], self.mass.shape[1]

    def carry(self, units: Tensor, axis: int = 0) -> Tensor:
        """Return averages of the units, each weighted by the mass it sends."""
        check_units(self, units, axis)
        return along(self.matrix(), units, axis)

    def carry_readers(self, units: Tensor, axis: int = 0) -> Tensor:
        """Return the readers shared out: each unit of A reads by the share of the mass of B's unit it got."""
        check_units(self, units, axis)
        return along(self.mass / self.mass.sum(0, keepdim=True), units, axis)

    def then(self, after: Coupling) -> Coupling:
        """Return this plan followed by a permutation, or by a plan that takes as much from each unit as this one gives.

        Raises:
            ShapeError: another number of units or another mass, or a coupling that mixes units.
        """
        follow(self, after)
        given = self.mass.sum(1)
        if isinstance(after, Plan):
            taken = after.mass.sum(0)
            if float((taken / taken.sum() - given / given.sum()).abs().max()) > 1e-9:
                raise ShapeError(
                    "Composing plans: expected the second to take the mass that the first one gives each unit between "
                    "them, found other shares. Scale the rows of the first, or carry by one after the other."
                )
            return Plan((after.mass / taken) @ self.mass)
        order = after.matrix()
        if not bool(((order == 0) | (order == 1)).all()):
            raise ShapeError(
                "Composing couplings: only a Permutation or another Plan can follow a transport plan, found "
                f"{type(after).__name__}. Carry the tensors by one after the other."
            )
        return Plan(order @ self.mass)

    def inverse(self) -> Never:
        """Refuse: nothing undoes an average.

        Raises:
            ShapeError: always.
        """
        raise ShapeError(
            f"A transport plan between {self.shape[0]} and {self.shape[1]} units averages units, which nothing undoes. "
            "Round it to a Permutation first, or couple the networks the other way round."
        )

    def matrix(self) -> Tensor:
        """Return the weights of the averages: the mass divided by the sums of its rows."""
        return self.mass / self.mass.sum(1, keepdim=True)

    def __repr__(self) -> str:
        """Return one line."""
        return f"Plan({self.shape[0]} units of A, {self.shape[1]} of B)"
