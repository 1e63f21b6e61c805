r"""Which entries are proven to differ: positions found by ranking others depend on the order of the axis.

The position of a maximum moves with its axis as long as the maximum is unique. Among equal entries ``argmax`` and
its kin take the first one, and which unit that is depends on the order. So entries count as distinct only where a
rule below proves it; an operator that is not named here may make equal entries.

A proof speaks of real arithmetic and of parameters in general position: it holds for all values of the parameters
but a set of measure zero, and for every input. It rests on four kinds of facts about a tensor:

* *depends*: the parameters that can influence it;
* *linear*: the parameters in which it is linear while all others are held fixed (zeros are linear in all);
* *nonzero*: axes along which no vector is zero; *solid*: no entry is zero;
* *distinct*: axes along which the entries of every vector differ.

The two sources of distinct entries are ``z + b``, where a parameter ``b`` with one entry per unit does not influence
``z`` (given all else, ``z_i + b_i = z_j + b_j`` has probability zero), and ``W h`` where ``W`` does not influence ``h``
and ``h`` is not zero (likewise ``(w_i - w_j)·h = 0``). That ``h`` is not zero is proven through embeddings, gains and
residual sums: where ``y`` is linear in a parameter that does not influence ``x``, the sum ``x + y`` is ``x ≠ 0`` if
``y`` vanishes identically, and vanishes with probability zero otherwise.

What is strictly monotone in real arithmetic and not on a computer does not carry the proof: ``tanh`` and ``sigmoid``
are flat beyond ten or twenty, ``exp`` ends at zero and infinity, and half precision rounds different logits to one.
``softmax`` carries it: it merges only what lies some hundred nats below the greatest, with probabilities of zero.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from isthmus.symmetry._trace import bound_arguments, operator_of

__all__ = ["Ties"]

_ALL = -1
"""The set of all parameters; sets are the bits of an integer."""
_Dims = frozenset[int]
_NONE: _Dims = frozenset()
_LEAST, _MOST = 1e-6, 1e6
"""A factor between these keeps different entries apart, also when they are rounded."""
_SHIFT = 100
"""A number up to this, added to logits, does not absorb their differences."""


@dataclass(frozen=True)
class _Facts:
    """What is proven of a tensor (see the module). ``copied``: its entries are entries of this one parameter."""

    depends: int = 0
    linear: int = 0
    copied: int = 0
    nonzero: _Dims = _NONE
    distinct: _Dims = _NONE
    solid: bool = False


_UNKNOWN = _Facts(depends=_ALL)


class Ties:
    """Proves, node by node, that the entries of tensors differ.

    Args:
        parameters: from placeholder name to the parameter it stands for; tied ones stand for the same.
        known: names of the other placeholders of the graph (inputs, buffers, constants), which no parameter influences.
    """

    def __init__(self, parameters: Mapping[str, str], known: Iterable[str]) -> None:
        bits = {name: 1 << k for k, name in enumerate(sorted(set(parameters.values())))}
        self._bits = {place: bits[name] for place, name in parameters.items()}
        self._known = frozenset(known)
        self._facts: dict[fx.Node, _Facts] = {}

    def same(self, node: fx.Node, source: Any) -> None:
        """Say that a node of a sub-graph is a node of the graph around it, or the other way round."""
        self._facts[node] = self._of(source) if isinstance(source, fx.Node) else _Facts()

    def note(self, node: fx.Node) -> None:
        """Prove what can be proven of one more node, after those it reads."""
        depends = 0
        for source in node.all_input_nodes:
            depends |= self._of(source).depends
        facts = replace(self._proven(node), depends=depends)
        self._facts[node] = facts if _precise(node) else replace(facts, distinct=_NONE)

    def are_distinct(self, ranking: fx.Node) -> bool:
        """Return whether the entries that an operator ranks along its axis ``dim`` are proven to differ."""
        arguments = bound_arguments(ranking)
        source, dim = next(iter(arguments.values()), None), arguments.get("dim")
        if not isinstance(source, fx.Node) or not isinstance(dim, int) or not _shape(source):
            return False
        return dim % len(_shape(source)) in self._of(source).distinct

    def _of(self, node: fx.Node) -> _Facts:
        if node not in self._facts and node.op == "placeholder" and node.name in self._bits:
            self._facts[node] = _parameter(self._bits[node.name], node)
        if node.op == "get_attr" or (node.op == "placeholder" and node.name in self._known):
            return self._facts.get(node, _Facts())
        return self._facts.get(node, _UNKNOWN)

    def _proven(self, node: fx.Node) -> _Facts:
        if node.target is operator.getitem:
            return self._part(node)
        if not isinstance(node.target, torch._ops.OpOverload):
            return _UNKNOWN
        proof = _PROOFS.get(operator_of(node))
        if proof is None or not isinstance(node.meta.get("val"), (Tensor, tuple, list)):
            return _UNKNOWN
        return proof(_Call(node, self._of))

    def _part(self, node: fx.Node) -> _Facts:
        """Return the facts of one of the pieces that an axis was cut into."""
        tuple_node: Any = node.args[0]
        if not isinstance(tuple_node, fx.Node) or operator_of(tuple_node) not in _CUTS:
            return _UNKNOWN
        whole, arguments = self._of(tuple_node), bound_arguments(tuple_node)
        dim = arguments["dim"] % len(_shape(arguments["self"]))
        return replace(whole, nonzero=whole.nonzero - {dim})


class _Call:
    """An operator, its arguments by name, and the facts of those that are tensors."""

    def __init__(self, node: fx.Node, facts: Callable[[fx.Node], _Facts]) -> None:
        self.node = node
        self.arguments = bound_arguments(node)
        self._facts = facts

    def of(self, name: str) -> _Facts:
        """Return the facts of an argument: a number, or none, depends on nothing."""
        value = self.arguments.get(name)
        return self._facts(value) if isinstance(value, fx.Node) else _Facts()

    def given(self, name: str) -> bool:
        """Return whether an argument is a tensor."""
        return isinstance(self.arguments.get(name), fx.Node)

    def shape(self, name: str | None = None) -> tuple[int, ...]:
        """Return the shape of an argument, or of the result."""
        return _shape(self.node if name is None else self.arguments[name])

    def tensors(self) -> list[fx.Node]:
        """Return all arguments that are tensors, those in lists too."""
        return self.node.all_input_nodes

    def aligned(self, name: str, dims: _Dims) -> _Dims:
        """Return axes of an argument as axes of the result, where broadcasting leaves them whole."""
        own, made = self.shape(name), self.shape()
        shift = len(made) - len(own)
        return frozenset(d + shift for d in dims if own[d] == made[d + shift])

    def product(self) -> int:
        """Return the parameters in which a product of all operands is linear."""
        facts = [self._facts(n) for n in self.tensors()]
        found = 0
        for k, one in enumerate(facts):
            others = 0
            for j, other in enumerate(facts):
                others |= other.depends if j != k else 0
            found |= one.linear & ~others
        return found

    def sum(self) -> int:
        """Return the parameters in which a sum of all floating operands, at places the others give, is linear."""
        found = _ALL
        for n in self.tensors():
            value, facts = n.meta.get("val"), self._facts(n)
            floating = isinstance(value, Tensor) and value.is_floating_point()
            found &= facts.linear if floating else ~facts.depends
        return found


def _shape(node: Any) -> tuple[int, ...]:
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return tuple(int(s) for s in value.shape) if isinstance(value, Tensor) else ()


def _precise(node: fx.Node) -> bool:
    """Return whether a tensor has enough digits for different numbers to stay different."""
    values = node.meta.get("val")
    values = values if isinstance(values, (tuple, list)) else [values]
    return all(isinstance(v, Tensor) and v.dtype in (torch.float32, torch.float64) for v in values)


def _parameter(bit: int, node: fx.Node) -> _Facts:
    dims = frozenset(range(len(_shape(node))))
    return _Facts(bit, bit, bit, dims, dims if _precise(node) else _NONE, solid=True)


def _reasonable(number: Any) -> bool:
    """Return whether a factor keeps different entries different."""
    return isinstance(number, (int, float)) and _LEAST <= abs(number) <= _MOST


# --- Operators that keep entries as they are, or move them ------------------------------------------------------
def _unchanged(call: _Call) -> _Facts:
    return call.of("self") if call.given("self") else call.of("input")


def _selected(call: _Call) -> _Facts:
    """Entries picked by an index: linear in what they were linear in, and nothing more."""
    return _Facts(linear=call.product())


def _dims_of(call: _Call, moves: Callable[[_Call], Sequence[int | None]]) -> _Facts:
    """Rename axes: ``moves`` gives, for each axis of the operand, its place in the result."""
    facts, places = call.of("self"), moves(call)

    def renamed(dims: _Dims) -> _Dims:
        return frozenset(p for d in dims if (p := places[d]) is not None)

    return replace(facts, nonzero=renamed(facts.nonzero), distinct=renamed(facts.distinct))


def _permuted(call: _Call) -> list[int | None]:
    rank = len(call.shape())
    order = [d % rank for d in call.arguments["dims"]]
    return [order.index(d) for d in range(rank)]


def _transposed(call: _Call) -> list[int | None]:
    rank = len(call.shape())
    places: list[int | None] = list(range(rank))
    one, two = (call.arguments.get(k, -2 + j) % max(rank, 1) for j, k in enumerate(("dim0", "dim1")))
    if rank > 1:
        places[one], places[two] = two, one
    return places


def _unsqueezed(call: _Call) -> list[int | None]:
    place = call.arguments["dim"] % len(call.shape())
    return [d + (d >= place) for d in range(len(call.shape("self")))]


def _reshaped(call: _Call) -> _Facts:
    """Follow axes through a reshape: one that is cut keeps its entries distinct, one that is joined may not."""
    facts = call.of("self")
    nonzero: set[int] = set()
    distinct: set[int] = set()
    for old, new in _blocks(call.shape("self"), call.shape()):
        if len(new) == 1 and facts.nonzero & set(old):
            nonzero |= set(new)
        if len(old) == 1 and facts.distinct & set(old):
            distinct |= set(new)
        # all entries of a parameter that was only moved differ, along whatever axes they are put
        if facts.copied and set(old) <= facts.distinct and len(facts.distinct) == len(call.shape("self")):
            distinct |= set(new)
    return replace(facts, nonzero=frozenset(nonzero), distinct=frozenset(distinct))


def _blocks(old: Sequence[int], new: Sequence[int]) -> Iterable[tuple[list[int], list[int]]]:
    """Yield the shortest runs of old and new axes (of length 2 or more) that hold the same entries."""
    left = [d for d, n in enumerate(old) if n != 1]
    right = [d for d, n in enumerate(new) if n != 1]
    while left and right:
        a, b = [left.pop(0)], [right.pop(0)]
        while (m := math.prod(old[d] for d in a)) != (n := math.prod(new[d] for d in b)):
            if m == 0 or n == 0 or not (left if m < n else right):
                return
            (a if m < n else b).append((left if m < n else right).pop(0))
        yield a, b


def _expanded(call: _Call) -> _Facts:
    facts = call.of("self")
    return replace(
        facts, nonzero=call.aligned("self", facts.nonzero), distinct=call.aligned("self", facts.distinct)
    )


def _cast(call: _Call) -> _Facts:
    made, read = call.node.meta["val"], call.arguments["self"].meta["val"]
    finer = made.is_floating_point() and torch.promote_types(made.dtype, read.dtype) == made.dtype
    return call.of("self") if finer else _Facts()


def _cut(call: _Call) -> _Facts:
    return call.of("self")


def _sliced(call: _Call) -> _Facts:
    facts, dim = call.of("self"), call.arguments["dim"] % len(call.shape())
    whole = call.shape("self")[dim] == call.shape()[dim]
    return facts if whole else replace(facts, nonzero=facts.nonzero - {dim})


# --- Arithmetic -------------------------------------------------------------------------------------------------
def _zeros(_: _Call) -> _Facts:
    return _Facts(linear=_ALL)


def _multilinear(call: _Call) -> _Facts:
    return _Facts(linear=call.product())


def _summed(call: _Call) -> _Facts:
    return _Facts(linear=call.sum())


def _negated(call: _Call) -> _Facts:
    return replace(call.of("self"), copied=0)


def _added(call: _Call) -> _Facts:
    """Add: a parameter that does not influence the other operand tells entries apart, and keeps all that is proven."""
    if not call.given("other") or not call.given("self"):
        number = call.arguments["other"] if call.given("self") else call.arguments["self"]
        kept = call.of("self") if call.given("self") else call.of("other")
        shifts = isinstance(number, (int, float)) and abs(number) <= _SHIFT and _scale(call)
        return _Facts(distinct=kept.distinct if shifts else _NONE)
    if not _scale(call):
        return _Facts()
    sides = [_plus(call, "self", "other"), _plus(call, "other", "self")]
    return _Facts(
        linear=call.sum(),
        nonzero=sides[0].nonzero | sides[1].nonzero,
        distinct=sides[0].distinct | sides[1].distinct,
        solid=sides[0].solid or sides[1].solid,
    )


def _scale(call: _Call) -> bool:
    return _reasonable(call.arguments.get("alpha", 1)) and _reasonable(call.arguments.get("beta", 1))


def _plus(call: _Call, name: str, other: str) -> _Facts:
    """Return what is still true of an operand after something was added that is linear in a strange parameter."""
    facts, added = call.of(name), call.of(other)
    if call.shape(name) == call.shape() and added.linear & ~facts.depends:
        return facts
    if facts.copied and not facts.copied & added.depends:  # a bias: its entries are those of a parameter
        dims = call.aligned(name, facts.distinct)
        return _Facts(distinct=dims, nonzero=frozenset(range(len(call.shape()))), solid=True)
    return _Facts()


def _multiplied(call: _Call) -> _Facts:
    if not call.given("other") or not call.given("self"):
        number = call.arguments["other"] if call.given("self") else call.arguments["self"]
        kept = replace(call.of("self") if call.given("self") else call.of("other"), copied=0)
        return (
            kept
            if _reasonable(number)
            else _Facts(linear=kept.linear if isinstance(number, (int, float)) else 0)
        )
    x, y = call.of("self"), call.of("other")
    nonzero = (call.aligned("self", x.nonzero) if y.solid else _NONE) | (
        call.aligned("other", y.nonzero) if x.solid else _NONE
    )
    distinct = _by_one_number(call, "self", "other") | _by_one_number(call, "other", "self")
    return _Facts(linear=call.product(), nonzero=nonzero, distinct=distinct, solid=x.solid and y.solid)


def _by_one_number(call: _Call, name: str, factor: str) -> _Dims:
    """Return the axes on which distinct entries are all scaled by one parameter, which is not zero."""
    facts, scale = call.of(name), call.of(factor)
    if not scale.copied:
        return _NONE
    shape, own = call.shape(), call.shape(factor)
    equal = {d for d in range(len(shape)) if (k := d - len(shape) + len(own)) < 0 or own[k] == 1}
    return call.aligned(name, facts.distinct) & equal


def _divided(call: _Call) -> _Facts:
    if not call.given("self"):
        return _Facts()
    x, y = call.of("self"), call.of("other")
    if not call.given("other"):
        return replace(x, copied=0) if _reasonable(call.arguments["other"]) else _Facts()
    kept = x.linear & ~y.depends
    return _Facts(
        linear=kept, nonzero=call.aligned("self", x.nonzero) if y.solid else _NONE, solid=x.solid and y.solid
    )


def _never_zero(_: _Call) -> _Facts:
    return _Facts(solid=True)


def _power(call: _Call) -> _Facts:
    exponent = call.arguments.get("exponent")
    return _Facts(solid=isinstance(exponent, (int, float)) and exponent < 0)


def _softmax(call: _Call) -> _Facts:
    dims = call.of("self").distinct & {call.arguments["dim"] % max(len(call.shape()), 1)}
    return _Facts(distinct=dims)


def _leaky(call: _Call) -> _Facts:
    facts = call.of("self")
    steep = _reasonable(call.arguments["negative_slope"]) and call.arguments["negative_slope"] > 0
    return _Facts(nonzero=facts.nonzero, distinct=facts.distinct, solid=facts.solid) if steep else _Facts()


# --- Layers with parameters -------------------------------------------------------------------------------------
def _every(call: _Call, axis: int) -> _Facts:
    """Return the facts of a result that has entries which differ along an axis and are never zero."""
    rank = len(call.shape())
    return _Facts(nonzero=frozenset(range(rank)), distinct=frozenset({axis % rank}), solid=True)


def _biased(call: _Call, axis: int, others: Sequence[str]) -> _Facts | None:
    """Return what a bias with one entry per unit, which influences none of the others, proves."""
    bias, rest = call.of("bias"), 0
    for name in others:
        rest |= call.of(name).depends
    if not bias.copied or bias.copied & rest or 0 not in bias.distinct or len(call.shape("bias")) != 1:
        return None
    return _every(call, axis)


def _linear(call: _Call) -> _Facts:
    name = "input" if call.given("input") else "self"
    with_bias = _biased(call, -1, (name, "weight")) if call.given("bias") else None
    if with_bias is not None:
        return with_bias
    return _rows(call, name, "weight", "bias")


def _rows(call: _Call, data: str, matrix: str, bias: str) -> _Facts:
    """Rows of a parameter on a vector that is not zero and that the parameter does not influence.

    No entry may stand in the matrix twice: ``(v_i - v_j) Σ h`` vanishes where the sum of ``h`` does.
    """
    x, weight = call.of(data), call.of(matrix)
    linear = 0 if call.given(bias) else call.product()
    own = weight.copied and not weight.copied & (x.depends | call.of(bias).depends)
    whole = len(call.shape(matrix)) == 2 and weight.distinct >= {0, 1}
    rank = len(call.shape(data))
    if own and whole and rank and rank - 1 in x.nonzero:
        return replace(_every(call, -1), linear=linear)
    return _Facts(linear=linear)


def _matmul(call: _Call) -> _Facts:
    name = next(k for k in ("other", "mat2") if k in call.arguments)
    return _rows(call, "self", name, "bias")


def _addmm(call: _Call) -> _Facts:
    bias, rest = call.of("self"), call.of("mat1").depends | call.of("mat2").depends
    if bias.copied and not bias.copied & rest and _scale(call):
        dims = call.aligned("self", bias.distinct)
        return _Facts(nonzero=frozenset({0, 1}), distinct=dims, solid=True)
    return _Facts()


def _convolution(call: _Call) -> _Facts:
    found = _biased(call, 1 - len(call.shape("weight")), ("input", "weight")) if call.given("bias") else None
    return found or _Facts(linear=0 if call.given("bias") else call.product())


def _normalised(call: _Call) -> _Facts:
    """Shifts of a norm, one per channel (axis 1) or per position of the last axis."""
    last = operator_of(call.node) == "aten.layer_norm"
    data = "input" if "input" in call.arguments else "self"
    if last and len(call.arguments["normalized_shape"]) != 1:
        return _Facts()
    others = (data, "weight", "running_mean", "running_var")
    return (call.given("bias") and _biased(call, -1 if last else 1, others)) or _Facts()


def _root_mean_square(call: _Call) -> _Facts:
    x, gain = call.of("input"), call.of("weight")
    last = len(call.shape()) - 1
    kept = len(call.arguments["normalized_shape"]) == 1 and (gain.solid or not call.given("weight"))
    return _Facts(nonzero=x.nonzero & {last} if kept else _NONE)


def _embedded(call: _Call) -> _Facts:
    """Rows of a table: entries of its parameter, unless a row is kept at zero for padding."""
    table, rank = call.of("weight"), len(call.shape())
    if not table.copied or call.arguments.get("padding_idx", -1) >= 0:
        return _selected(call)
    everywhere = frozenset(range(rank))
    distinct = frozenset({rank - 1}) if 1 in table.distinct else _NONE
    linear = table.linear & ~call.of("indices").depends
    return _Facts(0, linear, table.copied, everywhere, distinct, solid=True)


_CUTS = frozenset(f"aten.{n}" for n in ("split", "chunk", "split_with_sizes", "tensor_split"))
_Proof = Callable[[_Call], _Facts]


def _named(proof: _Proof, *names: str) -> dict[str, _Proof]:
    return {f"aten.{name}": proof for name in names}


_PROOFS: dict[str, _Proof] = {
    **_named(_unchanged, "clone", "contiguous", "detach", "alias", "dropout", "feature_dropout", "lift_fresh_copy"),
    **_named(_cast, "to", "_to_copy", "type_as"),
    **_named(lambda c: _dims_of(c, _permuted), "permute"),
    **_named(lambda c: _dims_of(c, _transposed), "transpose", "t", "swapaxes"),
    **_named(lambda c: _dims_of(c, _unsqueezed), "unsqueeze"),
    **_named(_reshaped, "view", "reshape", "_unsafe_view", "flatten", "unflatten", "squeeze"),
    **_named(_expanded, "expand", "broadcast_to", "expand_as"),
    **dict.fromkeys(_CUTS, _cut),
    **_named(_sliced, "slice", "narrow"),
    **_named(_selected, "index", "gather", "index_select", "select", "take_along_dim"),
    **_named(_zeros, "zeros", "zeros_like", "new_zeros"),
    **_named(_multilinear, "bmm", "einsum", "sum", "mean"),
    **_named(_summed, "index_add", "scatter_add", "cat", "stack"),
    **_named(_negated, "neg"),
    **_named(_added, "add", "sub"),
    **_named(_multiplied, "mul"),
    **_named(_divided, "div"),
    **_named(_never_zero, "rsqrt", "reciprocal"),
    **_named(_power, "pow"),
    **_named(_softmax, "softmax", "log_softmax", "_softmax", "_log_softmax"),
    **_named(_leaky, "leaky_relu"),
    **_named(_linear, "linear"),
    **_named(_matmul, "matmul", "mm"),
    **_named(_addmm, "addmm"),
    **_named(_convolution, "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d"),
    **_named(_normalised, "batch_norm", "layer_norm", "group_norm", "instance_norm"),
    **_named(_root_mean_square, "rms_norm"),
    **_named(_embedded, "embedding"),
}  # fmt: skip
"""The white list. ``rsqrt``, reciprocals and negative powers of finite numbers are not zero; every other entry is
proven at its function."""
