"""Which class of couplings each group is matched by: what was asked for, within what the group allows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal

from isthmus.errors import DataError
from isthmus.matching._by_class import ByClass
from isthmus.matching._solvers import (
    ComplexFactors,
    LeastSquares,
    PlaneRotations,
    Procrustes,
    ScaledAssignment,
    SidedSolver,
    SignedAssignment,
)
from isthmus.symmetry import Acts, SymmetrySpec

__all__ = ["Factors", "Symmetry", "classes_of", "gains_in_the_way", "solvers_of", "spec_for"]

Factors = Literal["least squares", "norms"]
"""How the factor of a pair of units is found (see :class:`isthmus.matching.ScaledAssignment`)."""

Symmetry = Literal["permutations", "all"] | str | Iterable[str]
"""``"permutations"``, ``"all"``, or the largest classes that are wanted, by their names in :class:`Acts`."""

_LARGEST_FIRST = (
    Acts.GENERAL,
    Acts.ORTHOGONAL,
    Acts.MEAN_FIXING,
    Acts.MONOMIAL,
    Acts.POSITIVE,
    Acts.SIGNED,
    Acts.COMPLEX,
    Acts.PLANE_ROTATIONS,
)


def classes_of(spec: SymmetrySpec, symmetry: Symmetry) -> dict[str, Acts]:
    """Return, by group, the largest class that is wanted and that the group allows.

    What is smaller than a wanted class is wanted too. Groups that others are nested in (heads) are permuted: their
    blocks must stay whole.

    Args:
        spec: the groups, with their classes.
        symmetry: what is wanted.

    Raises:
        DataError: an unknown class.
    """
    wanted = _wanted(symmetry)
    outer = {name for group in spec.groups.values() for name, _ in group.within}
    return {
        name: Acts.PERMUTATION if name in outer else _largest(group.acts, wanted)
        for name, group in spec.groups.items()
    }


def spec_for(spec: SymmetrySpec, symmetry: Symmetry) -> SymmetrySpec:
    """Return a spec with its planes among the groups where rotations of pairs are wanted, and without them elsewhere.

    Args:
        spec: the groups, with or without their planes.
        symmetry: what is wanted.

    Raises:
        DataError: an unknown class.
    """
    if any(acts.contains(Acts.PLANE_ROTATIONS) for acts in _wanted(symmetry)):
        return spec.with_planes()
    turned = [name for name, group in spec.groups.items() if group.planes]
    return spec.restrict([name for name in spec.groups if name not in turned]) if turned else spec


def gains_in_the_way(spec: SymmetrySpec, symmetry: Symmetry) -> tuple[str, ...]:
    """Return remarks on groups that would be rotated, were it not for gains that scale their units one by one.

    Args:
        spec: the groups, with their classes.
        symmetry: what is wanted; nothing is said where no rotations are.
    """
    if not _wanted(symmetry) & {Acts.GENERAL, Acts.ORTHOGONAL, Acts.MEAN_FIXING}:
        return ()
    notes: list[str] = []
    for name, group in spec.groups.items():
        gains = sorted({slot.tensor for slot in group.slots if slot.role == "scales"})
        batch_norm = any(slot.tensor.endswith("running_var") for slot in group.slots)
        if gains and not batch_norm and group.acts in (Acts.PERMUTATION, Acts.SIGNED):
            notes.append(
                f"{name}: no rotations, since gains scale its units one by one ({gains[0]}"
                f"{f' and {len(gains) - 1} more' if len(gains) > 1 else ''}). isthmus.fold moves gains of norms into "
                "the layers that read them, and says where it cannot (such as the stream of a post-norm network)"
            )
    return tuple(notes)


def _wanted(symmetry: Symmetry) -> frozenset[Acts]:
    if symmetry == "permutations":
        return frozenset({Acts.PERMUTATION})
    if symmetry == "all":
        return frozenset(Acts)
    listed = [symmetry] if isinstance(symmetry, str) else list(symmetry)
    names = [str(acts) for acts in Acts]
    unknown = [name for name in listed if name not in names]
    if unknown:
        raise DataError(
            f"unknown symmetry {unknown[0]!r}: expected 'permutations', 'all', or classes among "
            f"{', '.join(map(repr, names))}."
        )
    found = {Acts(name) for name in listed}
    both = {Acts.SIGNED, Acts.POSITIVE} <= found
    return frozenset(found | ({Acts.MONOMIAL} if both else set()))


def _largest(allowed: Acts, wanted: frozenset[Acts]) -> Acts:
    fit = (c for c in _LARGEST_FIRST if allowed.contains(c) and any(w.contains(c) for w in wanted))
    return next(fit, Acts.PERMUTATION)


def solvers_of(
    classes: Mapping[str, Acts],
    rule: Factors = "least squares",
    spec: SymmetrySpec | None = None,
) -> ByClass:
    """Return the usual solver of each group by its class.

    Args:
        classes: by group.
        rule: how factors are found (see :class:`isthmus.matching.ScaledAssignment`).
        spec: the groups, which say which units make a pair; default: units half of all apart.
    """
    usual: dict[Acts, SidedSolver] = {
        Acts.SIGNED: SignedAssignment(),
        Acts.POSITIVE: ScaledAssignment(rule),
        Acts.MONOMIAL: ScaledAssignment(rule, signed=True),
        Acts.MEAN_FIXING: Procrustes(fix_mean=True),
        Acts.ORTHOGONAL: Procrustes(),
        Acts.GENERAL: LeastSquares(),
    }
    found = {name: usual[acts] for name, acts in classes.items() if acts in usual}
    for name, acts in classes.items():
        planes = (spec.groups[name].planes if spec is not None else "") or "halves"
        if acts.pairs:
            found[name] = ComplexFactors(planes) if acts is Acts.COMPLEX else PlaneRotations(planes)
    return ByClass(found)
