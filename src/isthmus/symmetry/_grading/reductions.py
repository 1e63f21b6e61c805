"""Sums, means and extremes along some axes, and pools."""

from __future__ import annotations

from collections.abc import Sequence

from isthmus.symmetry._acts import Acts
from isthmus.symmetry._demands import ZERO, Grade
from isthmus.symmetry._grading.pointwise import positive
from isthmus.symmetry._grading.walk import GradeRule, Operator
from isthmus.symmetry._origins import shape_of
from isthmus.symmetry._spots import Place, Spot

__all__ = ["REDUCTIONS"]


def _reduced_axes(op: Operator) -> set[int]:
    rank = len(shape_of(op.node.all_input_nodes[0]))
    dims = op.bound.get("dim")
    if dims is None or dims == []:
        return set(range(rank))
    return {int(d) % rank for d in (dims if isinstance(dims, (list, tuple)) else [dims])}


def _widened(at: Place, over: set[int], rank: int) -> Place:
    """Return the entry of the operand at the start of what an entry of the result is reduced from."""
    if len(at) == rank:
        return tuple(0 if d in over else k for d, k in enumerate(at))
    own = iter(at)
    return tuple(0 if d in over else next(own) for d in range(rank))


def _kept(op: Operator, over: set[int], spot: Spot) -> Grade | None:
    source = op.node.all_input_nodes[0]
    rank = len(shape_of(source))
    one, two = (_widened(at, over, rank) for at in spot.ends())
    return op.carried(source, spot.atom, (one, two))


def _summed(op: Operator) -> None:
    """Sum or average: of the units themselves nothing but their mean is left."""
    source = op.node.all_input_nodes[0]
    over = _reduced_axes(op)
    graded = op.graded(source)
    for spot, grade in zip(graded.spots, graded.grades, strict=True):
        if spot.axis in over:
            most = Acts.ORTHOGONAL if grade.squared else Acts.MEAN_FIXING
            op.carried(source, spot.atom, spot.ends())
            op.demands(spot.atom).zero(grade, op.cause, most)
    op.each(lambda spot: _kept(op, over, spot))


def _extreme(op: Operator) -> None:
    """Take the largest or smallest along axes; where it was found does not change with positive factors."""
    over = _reduced_axes(op)

    def grade(spot: Spot) -> Grade | None:
        found = _kept(op, over, spot)
        return None if found is None else positive(op.demands(spot.atom), found, op)

    op.each(grade)
    for k in range(1, len(op.results)):
        op.each(lambda spot: ZERO, k)


def _length(op: Operator) -> bool | None:
    """Take Euclidean lengths: signs and rotations of what is summed over do not show."""
    if op.bound.get("ord", op.bound.get("p", 2)) not in (2, 2.0, None):
        return False
    source = op.node.all_input_nodes[0]
    over = _reduced_axes(op)
    graded = op.graded(source)
    for spot, grade in zip(graded.spots, graded.grades, strict=True):
        if spot.axis in over:
            demands = op.demands(spot.atom)
            demands.sizes.append((grade.size, op.cause))
            demands.limit(Acts.PERMUTATION if grade.squared else Acts.ORTHOGONAL, op.cause)
            op.carried(source, spot.atom, spot.ends())

    def grade_of(spot: Spot) -> Grade | None:
        found = _kept(op, over, spot)
        op.demands(spot.atom).limit(Acts.PERMUTATION, op.cause)
        return None if found is None else Grade(found.size)

    op.each(grade_of)
    return None


def _windowed(op: Operator, number: int, *, extreme: bool) -> None:
    """Grade a pool or an interpolation along the last axes."""
    source = op.node.all_input_nodes[0]

    def grade(spot: Spot) -> Grade | None:
        if spot.axis >= len(op.shape) - number:
            return None
        one, two = (tuple(0 if d >= len(at) - number else k for d, k in enumerate(at)) for at in spot.ends())
        found = op.carried(source, spot.atom, (one, two))
        return positive(op.demands(spot.atom), found, op) if found is not None and extreme else found

    op.each(grade)
    for k in range(1, len(op.results)):
        op.each(lambda spot: ZERO, k)


def _window(number: int, *, extreme: bool) -> GradeRule:
    def rule(op: Operator) -> None:
        _windowed(op, number, extreme=extreme)

    return rule


def _names(kinds: Sequence[str], number: int) -> list[str]:
    return [kind.format(number) for kind in kinds]


_AVERAGES = ("avg_pool{}d", "adaptive_avg_pool{}d", "_adaptive_avg_pool{}d", "upsample_nearest{}d")
_EXTREMES = (*("max_pool{}d", "max_pool{}d_with_indices", "adaptive_max_pool{}d"),)

REDUCTIONS: dict[str, GradeRule] = {
    **dict.fromkeys(("sum", "mean"), _summed),
    **dict.fromkeys(("amax", "amin", "max", "min"), _extreme),
    **dict.fromkeys(("linalg_vector_norm", "norm"), _length),
    **{name: _window(n, extreme=False) for n in (1, 2, 3) for name in _names(_AVERAGES, n)},
    **{name: _window(n, extreme=True) for n in (1, 2, 3) for name in _names(_EXTREMES, n)},
    **dict.fromkeys(("upsample_bilinear2d", "upsample_bicubic2d"), _window(2, extreme=False)),
    "upsample_linear1d": _window(1, extreme=False),
    "upsample_trilinear3d": _window(3, extreme=False),
}
