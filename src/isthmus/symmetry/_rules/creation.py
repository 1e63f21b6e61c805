"""Tensors made inside the model: uniform ones look the same in every order, all others are fixed."""

from __future__ import annotations

from typing import Any

from isthmus.symmetry import _axes
from isthmus.symmetry._operation import Operation, rule
from isthmus.symmetry._values import Value


@rule(
    "aten.zeros", "aten.ones", "aten.full", "aten.empty", "aten.new_zeros", "aten.new_ones", "aten.new_full"
)
@rule(
    "aten.zeros_like", "aten.ones_like", "aten.full_like", "aten.empty_like", "aten.new_empty", kind="local"
)
@rule("aten.scalar_tensor", kind="local")
def uniform(op: Operation, **_: Any) -> Value:
    """Make a tensor of equal entries: every axis is free."""
    return Value(tuple(_axes.equal_copies(s) for s in op.shape), uniform=True)


@rule(
    "aten.arange",
    "aten.linspace",
    "aten.logspace",
    "aten.eye",
    "aten.tril_indices",
    "aten.triu_indices",
    kind="local",
)
def ordered(op: Operation, **_: Any) -> Value:
    """Make a tensor whose entries depend on their place."""
    return Value(tuple(op.fixed(s, "made inside the model from positions") for s in op.shape))
