"""Recurrent layers: candidates change as the units do, gates do not change."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from isthmus.symmetry._acts import Acts
from isthmus.symmetry._axes import Atom
from isthmus.symmetry._demands import Grade
from isthmus.symmetry._grading.walk import GradeRule, Operator
from isthmus.symmetry._origins import shape_of
from isthmus.symmetry._spots import Spot
from isthmus.symmetry._trace import flat

__all__ = ["RECURRENT"]

_GATES = {
    "lstm": (False, False, True, False),
    "gru": (False, False, True),
    "rnn_tanh": (True,),
    "rnn_relu": (True,),
}
"""Which rows of a cell's matrices are carried by the units, section by section: candidates are, gates are not."""


@dataclass
class _Cell:
    """One layer in one direction: its tensors, and how its units change, by atom, at units 0 and 1."""

    params: Sequence[fx.Node]
    own: dict[Atom, tuple[Grade, int, int]] = field(default_factory=dict[Atom, tuple[Grade, int, int]])


def _recurrent(op: Operator) -> bool | None:
    """Grade a recurrent layer.

    A tanh lets signs pass, a rectifier positive factors; the state that it starts from must change alike.
    """
    bound = op.bound
    params, given = list(bound["params"]), bound.get("input")
    layers, ways = int(bound["num_layers"]), 2 if bound.get("bidirectional") else 1
    each = len(params) // (layers * ways)
    if each not in (2, 4) or not isinstance(given, fx.Node):
        return False
    size = op.shapes[0][-1] // ways
    cells = [_Cell(params[k * each : (k + 1) * each]) for k in range(layers * ways)]
    for cell in cells:
        _grade_cell(op, cell, size)
    for k, cell in enumerate(cells):
        if k < ways:
            _read_input(op, cell.params[0], given)
        else:
            start = (k // ways - 1) * ways
            _read_layer(op, cell.params[0], cells[start : start + ways], size)
    _start(op, cells)
    last = cells[-ways:]
    op.each(lambda spot: _found(last[min(spot.ends()[0][-1] // size, ways - 1)], spot, len(op.shape)))
    for k in range(1, len(op.results)):
        op.each(lambda spot: _found(cells[spot.ends()[0][0]], spot, spot.rank), k)
    return None


def _found(cell: _Cell, spot: Spot, rank: int) -> Grade | None:
    own = cell.own.get(spot.atom)
    return own[0] if own is not None and spot.axis == rank - 1 else None


def _grade_cell(op: Operator, cell: _Cell, size: int) -> None:
    """Grade the units of a cell by the rows of its candidates, and demand what its matrices must do."""
    kind = op.name.removeprefix("aten.")
    for spot in op.graded(cell.params[0]).spots:
        one, two = (at[0] for at in spot.ends())
        if spot.axis != 0 or two >= size or spot.atom in cell.own:
            continue
        grade = _candidates(op, cell, spot.atom, (one, two), size)
        if grade is None:
            continue
        demands = op.demands(spot.atom)
        demands.limit(Acts.PERMUTATION, op.cause)
        made = (demands.unsigned if kind == "rnn_relu" else demands.unsized)(grade, op.cause)
        cell.own[spot.atom] = made, one, two
        _cancel(op, cell.params[1], spot.atom, made, one, two)


def _candidates(op: Operator, cell: _Cell, atom: Atom, units: tuple[int, int], size: int) -> Grade | None:
    """Return how candidates change, in all tensors alike; gates stay."""
    found: Grade | None = None
    missing = False
    for section, carried in enumerate(_GATES[op.name.removeprefix("aten.")]):
        for tensor in cell.params:
            rest = [0] * (len(shape_of(tensor)) - 1)
            one, two = ((section * size + unit, *rest) for unit in units)
            grade = op.carried(tensor, atom, (one, two))
            if grade is None:
                missing = missing or carried
            elif not carried:
                op.demands(atom).zero(grade, op.cause)
            elif found is not None:
                op.demands(atom).equal(grade, found, op.cause)
            else:
                found = grade
    if missing and found is not None:  # one of the tensors is the same for all units
        op.demands(atom).zero(found, op.cause)
    return found


def _read_input(op: Operator, weight: fx.Node, given: fx.Node) -> None:
    """Demand that what flows into a layer cancels with the matrix that reads it."""
    graded = op.graded(given)
    last = len(shape_of(given)) - 1
    for spot, grade in zip(graded.spots, graded.grades, strict=True):
        if spot.axis == last:
            op.carried(given, spot.atom, spot.ends())
            one, two = (at[last] for at in spot.ends())
            _cancel(op, weight, spot.atom, grade, one, two)


def _read_layer(op: Operator, weight: fx.Node, before: Sequence[_Cell], size: int) -> None:
    """Demand the same of what the layer before hands on, direction by direction."""
    for k, cell in enumerate(before):
        for atom, (grade, one, two) in cell.own.items():
            _cancel(op, weight, atom, grade, k * size + one, k * size + two)


def _cancel(op: Operator, weight: fx.Node, atom: Atom, grade: Grade, one: int, two: int) -> None:
    reads = op.carried(weight, atom, ((0, one), (0, two)))
    if reads is None:
        op.demands(atom).zero(grade, op.cause)
    else:
        op.demands(atom).summed(reads, grade, op.cause)
        op.demands(atom).read(reads)


def _start(op: Operator, cells: Sequence[_Cell]) -> None:
    """Demand that the states a recurrence starts from change as its units do; zero changes with anything."""
    for state in flat([op.bound["hx"]]):
        graded, last = op.graded(state), len(shape_of(state)) - 1
        held = {spot.atom for spot in graded.spots if spot.axis == last}
        for spot, grade in zip(graded.spots, graded.grades, strict=True):
            known: list[Any] = [cell.own[spot.atom] for cell in cells if spot.atom in cell.own]
            if known and spot.axis == last:
                op.carried(state, spot.atom, spot.ends())
                for own, _, _ in known:
                    op.demands(spot.atom).equal(grade, own, op.cause)
        for cell in cells if not op.is_nothing(state) else ():
            for atom, (own, _, _) in cell.own.items():
                if atom not in held:  # the same for all units, and perhaps not zero
                    op.demands(atom).zero(own, op.cause)


RECURRENT: dict[str, GradeRule] = dict.fromkeys(_GATES, _recurrent)
