"""Tensors as the interpreter sees them: labels of their axes, and what is known of their entries."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from isthmus.symmetry import _axes
from isthmus.symmetry._axes import Expression, Pin

__all__ = ["Pointer", "Value", "constant_value", "values_in"]


@dataclass(frozen=True)
class Pointer:
    """What the entries of an index tensor count: positions of an axis (``token`` tells two tensors apart).

    ``tied`` is false only where the ranked entries are proven to differ; among equal ones the order decides which
    position is taken.
    """

    axis: Expression
    token: int
    tied: bool = True


@dataclass(frozen=True)
class Value:
    """A tensor as the interpreter sees it: one label expression per axis.

    Attributes:
        axes: the labels.
        run: for a constant that holds the integers ``run, run + 1, …`` (an index such as ``[-2, -1]``): the first.
        uniform: whether all entries are known to be equal.
        points: for entries that count positions of an axis which may move (the choice of a router): that axis.
    """

    axes: tuple[Expression, ...]
    run: int | None = None
    uniform: bool = False
    points: Pointer | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Lengths of the axes."""
        return tuple(a.size for a in self.axes)

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self.axes)


def values_in(tree: Any) -> list[Value]:
    """Return all labelled tensors in arguments or results, those of segments too."""
    if isinstance(tree, Value):
        return [tree]
    if isinstance(tree, Mapping):
        return [v for item in tree.values() for v in values_in(item)]
    if isinstance(tree, (tuple, list)):
        return [v for item in tree for v in values_in(item)]
    return list(getattr(tree, "parts", ()))


def constant_value(tensor: Tensor, why: Pin) -> Value:
    """Return the labels of a constant: free along axes on which all entries are equal, else fixed for a reason."""
    equal = [_is_equal_along(tensor, k) for k in range(tensor.ndim)]
    axes = (
        _axes.equal_copies(int(s)) if same else _axes.immovable(int(s), why)
        for s, same in zip(tensor.shape, equal, strict=True)
    )
    return Value(tuple(axes), _run_of(tensor), uniform=not tensor.is_meta and all(equal))


def _is_equal_along(tensor: Tensor, axis: int) -> bool:
    if tensor.is_meta or tensor.numel() == 0:
        return False
    return bool((tensor == tensor.narrow(axis, 0, 1)).all())


def _run_of(tensor: Tensor) -> int | None:
    """Return the first entry of a constant that counts upwards by ones, else ``None``."""
    if tensor.is_meta or tensor.dtype != torch.int64 or tensor.ndim != 1 or not 0 < len(tensor) <= 64:
        return None
    first = int(tensor[0])
    counts = torch.equal(tensor.cpu(), torch.arange(first, first + len(tensor)))
    return first if counts and (first >= 0 or first + len(tensor) <= 0) else None
