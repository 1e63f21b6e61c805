"""Sums of products, norms and recurrent cells."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import fx

from isthmus.symmetry._acts import Acts
from isthmus.symmetry._contractions import Contraction, contraction_of, convolution_of
from isthmus.symmetry._demands import ZERO, Grade
from isthmus.symmetry._grading.walk import GradeRule, Operator
from isthmus.symmetry._listed import CONVOLUTIONS, SUMS
from isthmus.symmetry._origins import shape_of
from isthmus.symmetry._powers import plus
from isthmus.symmetry._spots import Spot

__all__ = ["LAYERS"]

_ByLetter = Mapping[Any, int]


def _contraction(op: Operator) -> bool | None:
    form = contraction_of(op.node)
    if form is None or form.mixed:
        return False
    _contract(op, form)
    return None


def _convolution(op: Operator) -> bool | None:
    form = convolution_of(op.node)
    if form is None:
        return False
    _contract(op, form, len(op.shape) - len([1 for letter in form.out if letter in form.mixed]) - 1)
    return None


def _contract(op: Operator, form: Contraction, bias_axis: int | None = None) -> None:
    """Sum products: what is summed over must cancel, and what is left is graded like its factors together."""
    _sum_over(op, form, [letter for letter in form.sizes() if letter not in form.out])
    op.each(lambda spot: _left(op, form, spot))
    if form.bias is not None:
        _shift(op, form.bias, bias_axis)


def _sum_over(op: Operator, form: Contraction, letters: Sequence[Any]) -> None:
    nothing = any(op.is_nothing(n) for n, _ in form.operands)
    for operand, own in form.operands:
        for spot in op.graded(operand).spots:
            letter = own[spot.axis]
            if letter not in letters or letter in form.mixed or list(own).count(letter) > 1:
                continue
            if nothing:
                op.carried(operand, spot.atom, spot.ends())
                continue
            ends = tuple(dict(zip(own, at, strict=True)) for at in spot.ends())
            found = [
                (j, g)
                for j, other in enumerate(form.operands)
                if (g := _at(op, form, other, spot, (ends[0], ends[1]))) is not None
            ]
            _cancel(op, spot, [g for _, g in found])
            for j, g in found:
                if not op.grading.is_data(form.operands[j][0]):
                    op.demands(spot.atom).read(g)


def _at(
    op: Operator,
    form: Contraction,
    operand: tuple[fx.Node, Sequence[Any]],
    spot: Spot,
    ends: tuple[_ByLetter, _ByLetter],
) -> Grade | None:
    """Return the grade of an operand between two values of the letters; letters not given are 0."""
    node, own = operand
    shape = shape_of(node)
    one, two = (
        tuple(0 if size == 1 else at.get(letter, 0) for letter, size in zip(own, shape, strict=True))
        for at in ends
    )
    return op.carried(node, spot.atom, (one, two))


def _cancel(op: Operator, spot: Spot, grades: Sequence[Grade]) -> None:
    demands = op.demands(spot.atom)
    if len(grades) == 2 and not any(g.squared for g in grades):
        demands.summed(grades[0], grades[1], op.cause)
    else:
        total = Grade(plus(*(g.size for g in grades)), plus(*(g.sign for g in grades)))
        demands.zero(total, op.cause)


def _left(op: Operator, form: Contraction, spot: Spot) -> Grade | None:
    letter = form.out[spot.axis]
    if letter in form.mixed:
        return None
    ends = tuple(dict(zip(form.out, at, strict=True)) for at in spot.ends())
    grades = [
        g for other in form.operands if (g := _at(op, form, other, spot, (ends[0], ends[1]))) is not None
    ]
    if len(grades) == 1 and not grades[0].squared:
        return grades[0]
    op.demands(spot.atom).limit(Acts.PERMUTATION, op.cause)
    return Grade(plus(*(g.size for g in grades)), plus(*(g.sign for g in grades))) if grades else None


def _shift(op: Operator, bias: fx.Node, axis: int | None = None) -> None:
    """Add a bias, broadcast from the right or along one axis: it must change like what it is added to."""

    def grade(spot: Spot, before: Grade) -> Grade:
        if op.is_nothing(bias):
            op.excuse(bias)
            return before
        found = _along(op, bias, spot, axis)
        demands = op.demands(spot.atom)
        if found is None:
            demands.zero(before, op.cause, Acts.MEAN_FIXING)
        else:
            demands.equal(before, found, op.cause)
        return before

    made = op.made(0)
    op.each(lambda spot: grade(spot, made[op.results[0].index(spot)]))


def _along(op: Operator, tensor: Any, spot: Spot, axis: int | None) -> Grade | None:
    """Return the grade of a tensor that is broadcast from the right, or lies along one axis of the result."""
    if axis is None:
        return op.beside(tensor, spot)
    if spot.axis != axis or not isinstance(tensor, fx.Node):
        return None
    one, two = spot.ends()
    return op.carried(tensor, spot.atom, ((one[axis],), (two[axis],)))


def _attention(op: Operator) -> bool | None:
    """Grade attention: scores are inner products inside a softmax, values are averaged."""
    form = contraction_of(op.node)
    if form is None:
        return False
    (query, _), (key, _), (value, _) = form.operands
    ranks = {tuple(shape_of(n)[:-2]) for n in (query, key, value)}
    if len(ranks) > 1:  # grouped queries: heads are repeated inside the operator
        _grouped_attention(op, form)
        return None
    scores = Contraction(form.operands[:2], [*form.out[:-1], "s"])
    _sum_over(op, scores, ["d"])
    op.stay(op.bound.get("attn_mask"))

    def grade(spot: Spot) -> Grade | None:
        letter = form.out[spot.axis]
        ends = tuple(dict(zip(form.out, at, strict=True)) for at in spot.ends())
        q, k, v = (_at(op, form, other, spot, (ends[0], ends[1])) for other in form.operands)
        if letter == "v":
            return v
        inner = [g for g in (q, k) if g is not None]
        demands = op.demands(spot.atom)
        demands.limit(Acts.PERMUTATION, op.cause)
        total = Grade(plus(*(g.size for g in inner)), plus(*(g.sign for g in inner)))
        demands.zero(total, op.cause)
        return ZERO if v is None else v

    op.each(grade)
    return None


def _grouped_attention(op: Operator, form: Contraction) -> None:
    """Grade attention whose keys and values are shared by several heads: along dimensions only."""
    rest = [*range(len(form.out) - 3)]
    operands = [(n, [*rest, ("h", k), *own[-2:]]) for k, (n, own) in enumerate(form.operands)]
    scores = Contraction(operands[:2], [])
    _sum_over(op, scores, ["d"])
    op.stay(op.bound.get("attn_mask"))

    def grade(spot: Spot) -> Grade | None:
        if spot.axis != len(form.out) - 1:
            return None
        ends = tuple(dict(zip([*rest, ("h", 2), "l", "v"], at, strict=True)) for at in spot.ends())
        moved = tuple({**at, ("h", 2): 0, "l": 0} for at in ends)
        return _at(op, form, operands[2], spot, (moved[0], moved[1]))

    op.each(grade)


# --- Norms -----------------------------------------------------------------------------------------------------


def _tensor(op: Operator, name: str) -> Any:
    found = op.bound.get(name)
    return found if isinstance(found, fx.Node) else None


def _normed(op: Operator) -> None:
    """Grade LayerNorm and RMSNorm: their result forgets factors, and its gain sets new ones."""
    mean_free = "rms_norm" not in op.name
    source = op.node.all_input_nodes[0]
    number = len(op.bound["normalized_shape"])
    rank = len(op.shape)
    weight, bias = _tensor(op, "weight"), _tensor(op, "bias")
    gain_known = op.grading.state_name(weight) in op.grading.ones if weight is not None else True
    if gain_known:
        op.excuse(weight)

    def grade(spot: Spot) -> Grade | None:
        before = op.carried(source, spot.atom, spot.ends())
        if before is None:
            return None
        demands = op.demands(spot.atom)
        alone = spot.axis >= rank - number
        single = alone and number == 1
        most = (Acts.MEAN_FIXING if mean_free else Acts.ORTHOGONAL) if single else Acts.PERMUTATION
        demands.limit(most if not before.squared else Acts.PERMUTATION, op.cause)
        demands.sizes.append((before.size, op.cause))
        if mean_free or not alone:
            demands.signs.append((before.sign, op.cause))
        made = Grade({}, {} if mean_free else before.sign, before.turn)
        gain = None if gain_known else op.beside(weight, spot)
        if gain is None:
            return made
        demands.limit(Acts.PERMUTATION, op.cause)
        return Grade(gain.size, plus(made.sign, gain.sign), made.turn)

    op.each(grade)
    if bias is not None:
        _shift(op, bias)


def _channel_normed(op: Operator) -> bool | None:
    """Grade BatchNorm, GroupNorm and InstanceNorm: a gain and a bias for every channel.

    Signs and factors before the norm are left alone although BatchNorm would let signs pass: its statistics may be
    computed anew, and the gain holds them as well.
    """
    source = op.node.all_input_nodes[0]
    weight, bias = _tensor(op, "weight"), _tensor(op, "bias")
    for name in ("running_mean", "running_var"):
        op.stay(_tensor(op, name))

    def grade(spot: Spot) -> Grade | None:
        before = op.carried(source, spot.atom, spot.ends())
        demands = op.demands(spot.atom)
        demands.limit(Acts.PERMUTATION, op.cause)
        if before is not None:
            demands.zero(before, op.cause)
        gain = _along(op, weight, spot, 1)
        return ZERO if gain is None else Grade(gain.size, gain.sign)

    op.each(grade)
    if bias is not None:
        _shift(op, bias, 1)
    return None


def _weight_normed(op: Operator) -> None:
    """Grade ``g v / |v|``: factors of what is kept sit on ``g`` alone; signs and rotations of the rest pass."""
    bound = op.bound
    values, lengths, dim = bound["v"], bound["g"], int(bound.get("dim") or 0)

    def grade(spot: Spot) -> Grade | None:
        demands = op.demands(spot.atom)
        before = op.carried(values, spot.atom, spot.ends())
        if spot.axis != dim:
            if before is not None:
                demands.sizes.append((before.size, op.cause))
                demands.limit(Acts.ORTHOGONAL, op.cause)
            return None if before is None else Grade({}, before.sign, before.turn)
        if before is not None:
            demands.zero(before, op.cause)
        demands.limit(Acts.PERMUTATION, op.cause)
        one, two = (tuple(k if d == dim else 0 for d, k in enumerate(at)) for at in spot.ends())
        found = op.carried(lengths, spot.atom, (one, two))
        return None if found is None else Grade(found.size, found.sign)

    op.each(grade)


LAYERS: dict[str, GradeRule] = {
    **dict.fromkeys(("linear", "bilinear", "einsum", "outer", "ger", *SUMS), _contraction),
    **dict.fromkeys(CONVOLUTIONS, _convolution),
    "scaled_dot_product_attention": _attention,
    **dict.fromkeys(("layer_norm", "native_layer_norm", "rms_norm", "_fused_rms_norm"), _normed),
    **dict.fromkeys(
        (
            *("batch_norm", "_native_batch_norm_legit_no_training"),
            *("group_norm", "native_group_norm", "instance_norm"),
        ),
        _channel_normed,
    ),
    "_weight_norm": _weight_normed,
}
