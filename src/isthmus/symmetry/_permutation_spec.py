"""The field's own form of a symmetry: which permutation acts on which whole axis, as two dictionaries.

Git Re-Basin (Ainsworth, Hayase and Srinivasa 2023) and its ports write a symmetry by hand as
``perm_to_axes`` and ``axes_to_perm``. That form knows whole axes only: heads, flattened channels, segments
and blocks cannot be written in it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from isthmus.errors import SymmetryError

__all__ = ["PermutationSpec", "axes_of_permutations"]

PermToAxes = Mapping[str, Sequence[tuple[str, int]]]
AxesToPerm = Mapping[str, Sequence[str | None]]


@dataclass(frozen=True)
class PermutationSpec:
    """A symmetry as the pair of dictionaries used by weight-matching code.

    Attributes:
        perm_to_axes: from permutation name to the ``(tensor, axis)`` places it acts on.
        axes_to_perm: from tensor name to one permutation name (or None) per axis; every tensor is listed.
    """

    perm_to_axes: dict[str, list[tuple[str, int]]]
    axes_to_perm: dict[str, tuple[str | None, ...]]

    @classmethod
    def from_places(cls, places: PermToAxes, shapes: Mapping[str, Sequence[int]]) -> PermutationSpec:
        """Complete the pair from its first half.

        Raises:
            SymmetryError: two permutations act on one axis, which the form cannot express.
        """
        table: dict[str, list[str | None]] = {name: [None] * len(shape) for name, shape in shapes.items()}
        for perm, axes in places.items():
            for tensor, axis in axes:
                if table[tensor][axis] is not None:
                    raise SymmetryError(
                        f"a PermutationSpec has one permutation per axis, but {table[tensor][axis]!r} and "
                        f"{perm!r} both act on {tensor}[{axis}]. Use spec.restrict to choose one of them."
                    )
                table[tensor][axis] = perm
        return cls({p: list(axes) for p, axes in places.items()}, {t: tuple(row) for t, row in table.items()})


def axes_of_permutations(
    pair: PermutationSpec | PermToAxes | AxesToPerm, shapes: Mapping[str, Sequence[int]]
) -> dict[str, list[tuple[str, int]]]:
    """Read either half of the pair (or the pair) as ``perm_to_axes``, and check it against the shapes.

    Negative axes count from the end.

    Raises:
        SymmetryError: an unknown tensor, an axis it does not have, or a row of the wrong length.
    """
    given = pair.perm_to_axes if isinstance(pair, PermutationSpec) else pair
    places: dict[str, list[tuple[str, int]]] = {}
    for key, entries in given.items():
        by_tensor = all(entry is None or isinstance(entry, str) for entry in entries) and key in shapes
        if by_tensor:
            if len(entries) != len(shapes[key]):
                raise SymmetryError(
                    f"axes_to_perm lists {len(entries)} axes for {key!r}, which has shape {tuple(shapes[key])}."
                )
            pairs = [(str(perm), key, axis) for axis, perm in enumerate(entries) if perm is not None]
        else:
            pairs = [(key, *_place(key, entry)) for entry in entries]
        for perm, tensor, axis in pairs:
            if tensor not in shapes:
                raise SymmetryError(f"permutation {perm!r}: the network has no tensor {tensor!r}.")
            if not -len(shapes[tensor]) <= axis < len(shapes[tensor]):
                raise SymmetryError(
                    f"permutation {perm!r}: {tensor!r} has shape {tuple(shapes[tensor])}, so no axis {axis}."
                )
            places.setdefault(perm, []).append((tensor, axis % len(shapes[tensor])))
    return places


def _place(perm: str, entry: object) -> tuple[str, int]:
    if isinstance(entry, Sequence) and not isinstance(entry, str) and len(entry) == 2:
        tensor, axis = entry
        if isinstance(tensor, str) and isinstance(axis, int):
            return tensor, axis
    raise SymmetryError(
        f"permutation {perm!r}: expected (tensor, axis) pairs, found {entry!r}. Give perm_to_axes "
        "{permutation: [(tensor, axis), ...]} or axes_to_perm {tensor: (permutation or None, ...)}."
    )
