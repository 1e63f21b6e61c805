"""Relabellings: the couplings of all groups of a network, as one value that acts on its tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from isthmus.couplings import Coupling
from isthmus.errors import SymmetryError
from isthmus.symmetry._apply import Slots, apply, as_couplings, carry_tensor, check_permutations
from isthmus.symmetry._nested import nested_composition, nested_inverse
from isthmus.symmetry._spec import SymmetrySpec

__all__ = ["Relabelling"]


@dataclass(frozen=True, eq=False, repr=False)
class Relabelling:
    """A symmetry of a network: one coupling for each group that moves.

    Attributes:
        spec: the symmetries that the couplings act through.
        couplings: by group name; index tensors are taken as :class:`isthmus.couplings.Permutation`. A group that is
            missing stays as it is.

    Raises:
        SymmetryError: a coupling names an unknown group.
        ShapeError: a coupling is about another number of units than its group has.

    Example:
        >>> import torch, isthmus
        >>> from isthmus.couplings import Permutation
        >>> net = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.ReLU(), torch.nn.Linear(3, 1))
        >>> spec = isthmus.discover(net, torch.zeros(1, 2))
        >>> turn = Relabelling(spec, {name: torch.tensor([1, 2, 0]) for name in spec.groups})
        >>> turn.then(turn).then(turn).couplings == {name: Permutation.identity(3) for name in spec.groups}
        True
    """

    spec: SymmetrySpec
    couplings: Mapping[str, Coupling]

    def __post_init__(self) -> None:
        """Check the couplings against the groups."""
        object.__setattr__(self, "couplings", as_couplings(self.spec, self.couplings))

    def tensor(self, name: str, values: Tensor) -> Tensor:
        """Return one tensor carried.

        Args:
            name: of the parameter or buffer; one that the spec does not move is returned as it is.
            values: of B, any device and dtype.
        """
        return carry_tensor(values, self._slots.get(name, {}), self.couplings)

    @cached_property
    def _slots(self) -> Mapping[str, Slots]:
        return self._whole.slots_by_tensor()

    @cached_property
    def _whole(self) -> SymmetrySpec:
        return self.spec.with_planes()

    def apply(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return a state carried (see :func:`isthmus.apply`)."""
        return apply(self.spec, self.couplings, state)

    def then(self, after: Relabelling) -> Relabelling:
        """Return this relabelling followed by another one of the same network.

        Raises:
            SymmetryError: the other one acts through groups of other names or sizes.
        """
        mine, others = ({g.name: g.size for g in r.spec.with_planes().groups.values()} for r in (self, after))
        if mine != others:
            differing = sorted(mine.items() ^ others.items())[0][0]
            raise SymmetryError(
                f"Composing relabellings: expected the groups of one network, found {differing!r} with another size or "
                "in one of them only."
            )
        return Relabelling(self.spec, nested_composition(self._whole, self.couplings, after.couplings))

    def inverse(self) -> Relabelling:
        """Return the relabelling that undoes this one: couplings of nested groups follow their outer units."""
        return Relabelling(self.spec, nested_inverse(self._whole, self.couplings))

    @property
    def permutations(self) -> dict[str, Tensor]:
        """Index tensors by group.

        Raises:
            SymmetryError: a coupling is no permutation.
        """
        return check_permutations(self.spec, self.couplings)

    def __repr__(self) -> str:
        """Return one line."""
        kinds = sorted({type(c).__name__ for c in self.couplings.values()})
        by = ", ".join(kinds) or "nothing"
        return f"Relabelling({len(self.couplings)} of {len(self._whole.groups)} groups, by {by})"
