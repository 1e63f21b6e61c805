r"""Which operators keep the examples of a batch apart: a white list, with the reason for each entry.

A certificate bounds every example by itself, so at every node block ``k`` of axis 0 depends on example ``k`` alone.
The shape of a result does not show it (a roll, a pad by one and a crop by one, a convolution of a single image whose
channels lie on axis 0). So an operator is let through by its name and its arguments, and anything else mixes:

* *elementwise* ones compute each entry from one entry of the activation, and give back its shape;
* those that only *reshape* keep all entries in their order, so blocks of axis 0 stay whole as long as its length stays;
* those that act *along axes* take these as arguments, and axis 0 must not be among them, or come back as it was;
* *layers*, *pooling* and *enlarging* act on channels or space when the input has an axis for the examples: its rank
  tells, for without that axis torch reads channels from axis 0.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import fx

from isthmus.certificates._activations import ACTIVATIONS
from isthmus.symmetry import bound_arguments, operator_of

__all__ = ["ELEMENTWISE", "PARTS", "PIECES", "RESHAPES", "TURNS", "mixes_examples"]

ELEMENTWISE = {
    "aten.clone", "aten.contiguous", "aten.detach", "aten.alias", "aten.dropout", "aten.feature_dropout",
    "aten._to_copy", "aten.to", "aten.neg",
}  # fmt: skip
"""They give back every entry, or minus it (dropout in evaluation)."""

RESHAPES = {
    "aten.view", "aten.reshape", "aten._unsafe_view", "aten.flatten", "aten.unflatten", "aten.squeeze",
    "aten.unsqueeze",
}  # fmt: skip
TURNS = {
    "aten.permute", "aten.transpose", "aten.t", "aten.movedim", "aten.pixel_shuffle", "aten.pixel_unshuffle",
    "aten.channel_shuffle",
}  # fmt: skip
"""Without a rule below, they may turn axis 0 away; parameters may be turned in any way."""
PARTS = {"aten.slice", "aten.select", "aten.narrow"}
PIECES = {"aten.split", "aten.split_with_sizes", "aten.chunk", "aten.unbind"}

_JOINTS = ("aten.cat", "aten.stack")

_Lengths = Sequence[int]
_Keeps = Callable[[dict[str, Any], _Lengths, _Lengths], bool]
"""From arguments, shape before and shape after to whether axis 0 is left alone."""


def mixes_examples(node: fx.Node, source: fx.Node) -> str:
    """Say why an operator may mix the examples on axis 0 of its activation, empty if it cannot.

    Args:
        node: the operator.
        source: the activation it acts on; of several, any (they have one shape along axis 0).
    """
    name = operator_of(node)
    rule = _RULES.get(name)
    value = node.meta["val"]
    before, after = source.meta["val"].shape, (value if hasattr(value, "shape") else value[0]).shape
    if rule is None or len(before) == 0 or not rule(bound_arguments(node), before, after):
        axes = _SPACE.get(name)
        if axes is not None and len(before) != axes + 2:
            return f"without an axis for the examples, {len(before)} axes instead of {axes + 2}, it mixes examples"
        return "it joins examples" if name in _JOINTS else "it mixes examples"
    return ""


def _same_shape(_: dict[str, Any], before: _Lengths, after: _Lengths) -> bool:
    return tuple(before) == tuple(after)


def _same_length(_: dict[str, Any], before: _Lengths, after: _Lengths) -> bool:
    return len(after) > 0 and before[0] == after[0]


def _permute(given: dict[str, Any], before: _Lengths, _: _Lengths) -> bool:
    return int(given["dims"][0]) % len(before) == 0


def _transpose(given: dict[str, Any], before: _Lengths, _: _Lengths) -> bool:
    axes = {int(given[k]) % len(before) for k in ("dim0", "dim1")}
    return len(axes) == 1 or 0 not in axes


def _other_axis(given: dict[str, Any], before: _Lengths, _: _Lengths) -> bool:
    return int(given["dim"]) % len(before) != 0


def _part(given: dict[str, Any], before: _Lengths, after: _Lengths) -> bool:
    """Return whether a part is of another axis, or all of axis 0: steps are positive, so equal length is all."""
    return _other_axis(given, before, after) or tuple(before) == tuple(after)


def _joined_axis(given: dict[str, Any], _: _Lengths, after: _Lengths) -> bool:
    return int(given["dim"]) % len(after) != 0


def _reduced_axes(given: dict[str, Any], before: _Lengths, _: _Lengths) -> bool:
    dims = given.get("dim")
    dims = [dims] if isinstance(dims, int) else dims
    return bool(dims) and 0 not in {int(d) % len(before) for d in dims}


def _padded_axes(given: dict[str, Any], before: _Lengths, _: _Lengths) -> bool:
    """Pads are listed from the last axis on, two each; a crop is a negative pad."""
    pads = [int(p) for p in given["pad"]]
    return len(pads) < 2 * len(before) or not any(pads[2 * len(before) - 2 :])


def _rank_at_least(least: int) -> _Keeps:
    return lambda given, before, after: len(before) >= least and _same_length(given, before, after)


def _rank(rank: int) -> _Keeps:
    return lambda given, before, after: len(before) == rank and _same_length(given, before, after)


_SPATIAL = {"1d": 1, "2d": 2, "3d": 3}
_ALONG_SPACE = (
    "aten.conv", "aten.conv_transpose", "aten.max_pool", "aten.avg_pool", "aten.adaptive_avg_pool",
    "aten.upsample_nearest", "aten._upsample_nearest_exact",
)  # fmt: skip
_SPACE = {f"{name}{n}": axes for name in _ALONG_SPACE for n, axes in _SPATIAL.items()}
"""Number of axes in space of the operators that act on channels or space."""

_RULES: dict[str, _Keeps] = {
    **dict.fromkeys(ELEMENTWISE | set(ACTIVATIONS), _same_shape),
    # elementwise too, but for broadcasting, which their own rules refuse by name
    **dict.fromkeys(("aten.add", "aten.sub", "aten.mul", "aten.div", "aten.prelu"), _same_length),
    **dict.fromkeys(RESHAPES, _same_length),
    "aten.permute": _permute,
    "aten.transpose": _transpose,
    # they move the last three axes, and the second one
    "aten.pixel_shuffle": _rank_at_least(4),
    "aten.pixel_unshuffle": _rank_at_least(4),
    "aten.channel_shuffle": _rank_at_least(3),
    **dict.fromkeys(PARTS - {"aten.select"}, _part),
    **dict.fromkeys(PIECES | {"aten.select"}, _other_axis),
    **dict.fromkeys(_JOINTS, _joined_axis),
    **dict.fromkeys(("aten.sum", "aten.mean"), _reduced_axes),
    **dict.fromkeys(("aten.constant_pad_nd", "aten.pad"), _padded_axes),
    # products over the last axis, which must be another than that of the examples
    "aten.linear": _rank_at_least(2),
    "aten.addmm": _rank(2),
    **dict.fromkeys(("aten.batch_norm", "aten._native_batch_norm_legit_no_training"), _rank_at_least(2)),
    **{name: _rank(axes + 2) for name, axes in _SPACE.items()},
}
