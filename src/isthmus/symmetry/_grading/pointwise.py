"""Operators that compute every entry by itself: which of them are linear, homogeneous or odd."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import fx

from isthmus.symmetry._acts import Acts
from isthmus.symmetry._demands import ZERO, Demands, Grade
from isthmus.symmetry._grading.walk import GradeRule, Operator
from isthmus.symmetry._origins import shape_of
from isthmus.symmetry._powers import minus, plus, times
from isthmus.symmetry._spots import Spot

__all__ = ["POINTWISE", "positive"]

PointwiseRule = Callable[[Demands, Grade, Operator], Grade]


def _linear(demands: Demands, grade: Grade, op: Operator) -> Grade:
    return grade


def positive(demands: Demands, grade: Grade, op: Operator) -> Grade:
    """Grade a positively homogeneous function: ``f(λx) = λ f(x)`` for positive factors."""
    return demands.unsigned(grade, op.cause)


def _odd(demands: Demands, grade: Grade, op: Operator) -> Grade:
    """Grade an odd function: ``f(-x) = -f(x)``."""
    return demands.unsized(grade, op.cause)


def _even(demands: Demands, grade: Grade, op: Operator) -> Grade:
    demands.unsized(grade, op.cause)
    return ZERO


def _absolute(demands: Demands, grade: Grade, op: Operator) -> Grade:
    demands.limit(Acts.PERMUTATION, op.cause)
    return Grade(grade.size)


def _sign(demands: Demands, grade: Grade, op: Operator) -> Grade:
    demands.limit(Acts.PERMUTATION, op.cause)
    return Grade({}, grade.sign)


def _inverted(demands: Demands, grade: Grade, op: Operator) -> Grade:
    demands.limit(Acts.PERMUTATION, op.cause)
    return Grade(times(grade.size, -1), grade.sign)


def _unary(function: PointwiseRule) -> GradeRule:
    """Return the rule of a function of one tensor."""

    def grade_all(op: Operator) -> None:
        source = op.node.all_input_nodes[0]

        def grade(spot: Spot) -> Grade | None:
            found = op.beside(source, spot)
            return None if found is None else function(op.demands(spot.atom), found, op)

        op.each(grade)

    return grade_all


def _when(condition: Callable[[dict[str, Any]], bool], rule: GradeRule) -> GradeRule:
    """Return a rule that knows some calls of an operator only."""

    def chosen(op: Operator) -> bool | None:
        return rule(op) if condition(op.bound) else False

    return chosen


def _is_zero(given: Any) -> bool:
    """Return whether a number is zero, or a tensor is made of zeros."""
    if not isinstance(given, fx.Node):
        return isinstance(given, (int, float)) and given == 0
    name = getattr(given.target, "_opname", "")
    if name in ("scalar_tensor", "full", "full_like", "new_full"):
        return bool(given.args[0 if name == "scalar_tensor" else -1] == 0)
    return name in ("zeros", "zeros_like", "new_zeros")


def _symmetric(bound: dict[str, Any]) -> bool:
    low, high = (bound.get(a, bound.get(b)) for a, b in (("min", "min_val"), ("max", "max_val")))
    return isinstance(low, (int, float)) and isinstance(high, (int, float)) and low == -high <= 0


def _cut_at_zero(bound: dict[str, Any]) -> bool:
    """Return whether entries are clamped at zero from one side."""
    ends = [bound.get("min"), bound.get("max")]
    return sum(e is None for e in ends) == 1 and any(_is_zero(e) for e in ends)


# --- Several operands ----------------------------------------------------------------------------------------------


def _factors(op: Operator, names: Sequence[str]) -> list[Any]:
    """Return operands by name; what is not there is None."""
    return [op.bound.get(name) for name in names]


def _added(op: Operator) -> None:
    """Add: what carries units must change alike; a constant stays, so that nothing may scale."""
    terms = [t for t in _factors(op, ("self", "other")) if not _is_zero(t)]
    terms = [t for t in terms if not op.is_nothing(t)]
    for operand in op.operands:
        if operand not in terms:
            op.excuse(operand)

    def grade(spot: Spot) -> Grade | None:
        found = [op.beside(t, spot) for t in terms]
        carrying = [g for g in found if g is not None]
        demands = op.demands(spot.atom)
        for other in carrying[1:]:
            demands.equal(carrying[0], other, op.cause)
        if carrying and len(carrying) < len(found):
            demands.zero(carrying[0], op.cause, Acts.MEAN_FIXING)
        return carrying[0] if carrying else None

    op.each(grade)


def _multiplied(op: Operator) -> None:
    """Multiply: powers add; a gain of its own for every unit mixes with no matrix."""
    factors = _factors(op, ("self", "other"))
    kept = [f for f in factors if op.grading.state_name(f) not in op.grading.ones]
    for operand in op.operands:
        if operand not in kept:
            op.excuse(operand)
    if len(kept) == 2 and kept[0] is kept[1]:
        _raised(op, 2)
        return

    def grade(spot: Spot) -> Grade | None:
        carrying = [g for g in (op.beside(f, spot) for f in kept) if g is not None]
        return _product(op, spot, carrying)

    op.each(grade)


def _product(op: Operator, spot: Spot, carrying: Sequence[Grade]) -> Grade | None:
    if not carrying:
        return None
    if len(carrying) == 1 and not carrying[0].squared:
        return carrying[0]
    op.demands(spot.atom).limit(Acts.PERMUTATION, op.cause)
    return Grade(plus(*(g.size for g in carrying)), plus(*(g.sign for g in carrying)))


def _divided(op: Operator) -> bool | None:
    upper, lower = _factors(op, ("self", "other"))
    if op.bound.get("rounding_mode") is not None:
        return False

    def grade(spot: Spot) -> Grade | None:
        above, below = op.beside(upper, spot), op.beside(lower, spot)
        if below is None:
            return above
        op.demands(spot.atom).limit(Acts.PERMUTATION, op.cause)
        above = ZERO if above is None else above
        return Grade(minus(above.size, below.size), plus(above.sign, below.sign))

    op.each(grade)
    return None


def _raised(op: Operator, number: int | None = None) -> bool | None:
    """Raise to a whole power; squares may be summed over all units, as norms do, without harm to rotations."""
    source = op.node.all_input_nodes[0]
    power = op.bound.get("exponent") if number is None else number
    if not isinstance(power, (int, float)) or power != int(power) or power < 1:
        return False

    def grade(spot: Spot) -> Grade | None:
        found = op.beside(source, spot)
        if found is None or power == 1:
            return found
        squared = power == 2 and not found.squared and _is_summed_over(op.node, spot.axis)
        if not squared:
            op.demands(spot.atom).limit(Acts.PERMUTATION, op.cause)
        made = Grade(times(found.size, int(power)), times(found.sign, int(power) % 2))
        return Grade(made.size, made.sign, {}, squared=True) if squared else made

    op.each(grade)
    return None


def _is_summed_over(node: fx.Node, axis: int) -> bool:
    """Return whether everything that uses a value sums it, or takes its mean, over one of its axes."""
    rank = len(shape_of(node))
    for user in node.users:
        if getattr(user.target, "_opname", "") not in ("mean", "sum"):
            return False
        dims = user.args[1] if len(user.args) > 1 else user.kwargs.get("dim")
        if not isinstance(dims, (list, tuple)) or axis not in {int(d) % rank for d in dims}:  # pyright: ignore
            return False
    return bool(node.users)


def _compared(op: Operator, *, order: bool) -> bool | None:
    """Compare with zero: positive factors play no role, signs do where the order is asked."""
    if not _is_zero(op.bound.get("other")):
        return False
    source = op.bound["self"]

    def grade(spot: Spot) -> Grade | None:
        found = op.beside(source, spot)
        if found is not None:
            demands = op.demands(spot.atom)
            demands.limit(Acts.PERMUTATION, op.cause)
            if order:
                demands.unsigned(found, op.cause)
        return ZERO

    op.each(grade)
    return None


def _chosen(op: Operator) -> None:
    """Choose entry by entry: both values must change alike; zero changes with anything."""
    bound = op.bound
    values = [v for v in (bound.get("self"), bound.get("other")) if not (_is_zero(v) or op.is_nothing(v))]
    _selected(op, bound["condition"], values)


def _filled(op: Operator) -> bool | None:
    if not _is_zero(op.bound.get("value")):
        return False
    _selected(op, op.bound["mask"], [op.bound["self"]])
    return None


def _selected(op: Operator, condition: Any, values: Sequence[Any]) -> None:
    op.stay(condition)

    def grade(spot: Spot) -> Grade | None:
        found = [op.beside(v, spot) for v in values]
        carrying = [g for g in found if g is not None]
        demands = op.demands(spot.atom)
        demands.limit(Acts.PERMUTATION, op.cause)
        for other in carrying[1:]:
            demands.equal(carrying[0], other, op.cause)
        if not carrying:
            return ZERO
        if len(carrying) < len(found):
            demands.zero(carrying[0], op.cause)
        return carrying[0]

    op.each(grade)


def _extreme(op: Operator) -> None:
    """Take the larger or smaller of two entries."""
    values = _factors(op, ("self", "other"))

    def grade(spot: Spot) -> Grade | None:
        carrying = [g for g in (op.beside(v, spot) for v in values) if g is not None]
        if not carrying:
            return None
        demands = op.demands(spot.atom)
        for other in carrying[1:]:
            demands.equal(carrying[0], other, op.cause)
        if len(carrying) < 2:
            demands.zero(carrying[0], op.cause)
        return positive(demands, carrying[0], op)

    op.each(grade)


def _sloped(op: Operator) -> None:
    """Grade PReLU, whose slopes stay."""
    op.stay(op.bound["weight"])
    _unary(positive)(op)


def _gated(op: Operator) -> None:
    """Grade GLU: the first half of an axis times the sigmoid of the second."""
    source = op.bound["self"]
    dim = int(op.bound["dim"]) % len(op.shape)
    half = op.shape[dim]

    def grade(spot: Spot) -> Grade | None:
        one, two = spot.ends()
        beyond = tuple((*at[:dim], at[dim] + half, *at[dim + 1 :]) for at in (one, two))
        gate = op.carried(source, spot.atom, (beyond[0], beyond[1]))
        if gate is not None:
            op.demands(spot.atom).zero(gate, op.cause)
        return op.carried(source, spot.atom, (one, two))

    op.each(grade)


_ODD = (
    *("tanh", "sin", "sinh", "asinh", "atan", "asin", "atanh", "erf", "erfinv", "tan"),
    *("hardshrink", "softshrink", "round", "trunc", "fix", "frac"),
)
_POSITIVE = ("relu", "leaky_relu", "rrelu")

POINTWISE: dict[str, GradeRule] = {
    **dict.fromkeys(("neg", "negative", "positive"), _unary(_linear)),
    **dict.fromkeys(_POSITIVE, _unary(positive)),
    **dict.fromkeys(_ODD, _unary(_odd)),
    **dict.fromkeys(("cos", "cosh"), _unary(_even)),
    "abs": _unary(_absolute),
    "sign": _unary(_sign),
    "reciprocal": _unary(_inverted),
    "hardtanh": _when(_symmetric, _unary(_odd)),
    **dict.fromkeys(("clamp", "clip"), lambda op: _clamped(op)),
    "clamp_min": _when(lambda bound: _is_zero(bound.get("min")), _unary(positive)),
    "threshold": _when(
        lambda bound: _is_zero(bound.get("threshold")) and _is_zero(bound.get("value")), _unary(positive)
    ),
    **dict.fromkeys(("prelu", "_prelu_kernel"), _sloped),
    **dict.fromkeys(("add", "sub"), _added),
    "mul": _multiplied,
    "div": _divided,
    "pow": _raised,
    "square": partial(_raised, number=2),
    **{name: partial(_compared, order=True) for name in ("gt", "ge", "lt", "le")},
    **{name: partial(_compared, order=False) for name in ("eq", "ne")},
    "where": _chosen,
    "masked_fill": _filled,
    **dict.fromkeys(("maximum", "minimum"), _extreme),
    "glu": _gated,
}


def _clamped(op: Operator) -> bool | None:
    if _symmetric(op.bound):
        return _unary(_odd)(op)
    return _unary(positive)(op) if _cut_at_zero(op.bound) else False
