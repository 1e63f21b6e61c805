"""Recurrent layers: hidden units move in all gates, in the recurrent weights and in the states."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from isthmus.symmetry import _axes
from isthmus.symmetry._axes import ONE, Expression, Sum
from isthmus.symmetry._operation import Operation, rule
from isthmus.symmetry._segments import Stacked
from isthmus.symmetry._values import Value

_TIME = "steps of a recurrence"


def _cell(
    op: Operation, x: Expression, params: Sequence[Value], hidden: int, gates: int
) -> tuple[Expression, Expression]:
    """Join one layer and direction; return the labels of its hidden state and of its cell state.

    Parameters are (gates · hidden, inputs), (gates · hidden, state), two biases or none, and for projected
    states (state, hidden).
    """
    inputs, recurrent, *rest = params
    projection = rest.pop() if rest and rest[-1].ndim == 2 else None
    units: list[Expression] = []
    for value in (inputs, recurrent, *rest):
        units += op.segments(value.axes[0], [hidden] * gates)
    for unit in units[1:]:
        op.unify(units[0], unit)
    op.unify(x, inputs.axes[1])
    if projection is None:
        op.unify(recurrent.axes[1], units[0])
        return units[0], units[0]
    op.unify(projection.axes[1], units[0])
    op.unify(projection.axes[0], recurrent.axes[1])
    return projection.axes[0], units[0]


def _attach(
    op: Operation, state: Value | Stacked, places: Sequence[Expression], batch: tuple[Expression, ...]
) -> None:
    """Join given initial states, shape (layers · directions, batch, units); equal entries demand nothing.

    Segments (the final state of another recurrence) keep layers and directions apart; in a plain tensor they share
    the order of their units.
    """
    if isinstance(state, Stacked) and state.dim == 0 and state.lengths == (1,) * len(places):
        given = state.parts
    else:
        whole = state.join() if isinstance(state, Stacked) else state
        if whole.uniform:
            return
        if len(places) > 1 and not _axes.are_copies(whole.axes[0]):
            op.pin(whole.axes[0], "layers and directions of a recurrent state")
        given = (whole,) * len(places)
    for value, place in zip(given, places, strict=True):
        _join(op, value.axes[1:], (*batch, place))


def _join(op: Operation, state: Sequence[Expression], axes: Sequence[Expression]) -> None:
    """Join the axes of a state; along equal entries it demands nothing."""
    for one, two in zip(state, axes, strict=True):
        if not _axes.are_copies(one):
            op.unify(one, two)


def _recurrent(
    op: Operation,
    x: Value,
    states: Sequence[Value | Stacked],
    params: Sequence[Value],
    num_layers: int,
    bidirectional: bool,
    batch_first: bool,
    gates: int,
) -> tuple[Any, ...]:
    directions = 2 if bidirectional else 1
    each = len(params) // (num_layers * directions)
    hidden = params[0].shape[0] // gates
    time = 1 if batch_first and x.ndim == 3 else 0
    op.pin(x.axes[time], _TIME)
    features = x.axes[-1]
    outputs: list[Expression] = []
    cells: list[Expression] = []
    for layer in range(num_layers):
        made: list[Expression] = []
        for direction in range(directions):
            start = (layer * directions + direction) * each
            out, cell = _cell(op, features, params[start : start + each], hidden, gates)
            made.append(out)
            cells.append(cell)
        outputs += made
        features = _axes.resolve(Sum(tuple(made)))
    batch = () if x.ndim == 2 else (x.axes[1 - time],)
    for state, places in zip(states, (outputs, cells), strict=False):
        _attach(op, state, places, batch)
    result = Value((*x.axes[:-1], features))
    final = [Stacked(0, tuple(Value((ONE, *batch, p)) for p in places)) for places in (outputs, cells)]
    return (result, *final[: len(states)])


@rule("aten.lstm")
def lstm(
    op: Operation,
    x: Value,
    hx: Sequence[Value | Stacked],
    params: Sequence[Value],
    num_layers: int = 1,
    bidirectional: bool = False,
    batch_first: bool = False,
    **_: Any,
) -> Any:
    """Run a long short-term memory over a sequence."""
    return _recurrent(op, x, hx, params, num_layers, bidirectional, batch_first, gates=4)


@rule("aten.gru")
def gru(
    op: Operation,
    x: Value,
    hx: Value | Stacked,
    params: Sequence[Value],
    num_layers: int = 1,
    bidirectional: bool = False,
    batch_first: bool = False,
    **_: Any,
) -> Any:
    """Run gated recurrent units over a sequence."""
    return _recurrent(op, x, [hx], params, num_layers, bidirectional, batch_first, gates=3)


@rule("aten.rnn_tanh", "aten.rnn_relu")
def rnn(
    op: Operation,
    x: Value,
    hx: Value | Stacked,
    params: Sequence[Value],
    num_layers: int = 1,
    bidirectional: bool = False,
    batch_first: bool = False,
    **_: Any,
) -> Any:
    """Run a simple recurrent layer over a sequence."""
    return _recurrent(op, x, [hx], params, num_layers, bidirectional, batch_first, gates=1)


def _single(
    op: Operation, x: Value, states: Sequence[Value], params: Sequence[Value | None], gates: int
) -> Value:
    given = [p for p in params if p is not None]
    out, _ = _cell(op, x.axes[-1], given, given[0].shape[0] // gates, gates)
    for state in states:
        if not state.uniform:
            _join(op, state.axes, (*x.axes[:-1], out))
    return Value((*x.axes[:-1], out))


@rule("aten.lstm_cell")
def lstm_cell(
    op: Operation,
    x: Value,
    hx: Sequence[Value],
    w_ih: Value,
    w_hh: Value,
    b_ih: Value | None = None,
    b_hh: Value | None = None,
) -> tuple[Value, Value]:
    """Take one step of a long short-term memory."""
    state = _single(op, x, hx, (w_ih, w_hh, b_ih, b_hh), gates=4)
    return state, state


@rule("aten.gru_cell")
def gru_cell(
    op: Operation,
    x: Value,
    hx: Value,
    w_ih: Value,
    w_hh: Value,
    b_ih: Value | None = None,
    b_hh: Value | None = None,
) -> Value:
    """Take one step of a gated recurrent unit."""
    return _single(op, x, [hx], (w_ih, w_hh, b_ih, b_hh), gates=3)


@rule("aten.rnn_tanh_cell", "aten.rnn_relu_cell")
def rnn_cell(
    op: Operation,
    x: Value,
    hx: Value,
    w_ih: Value,
    w_hh: Value,
    b_ih: Value | None = None,
    b_hh: Value | None = None,
) -> Value:
    """Take one step of a simple recurrent layer."""
    return _single(op, x, [hx], (w_ih, w_hh, b_ih, b_hh), gates=1)
