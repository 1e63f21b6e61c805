"""Axes that an operator without a rule only passes along, found by running it.

The operator is run alone, in float64 and in the precision of the trace, on random operands of the traced shapes. If
permuting axis ``i`` of its operands permutes an axis ``j`` of every result and changes nothing else, in every draw, the
label passes from ``i`` to ``j``.
An experiment can refute and cannot prove, so the doors are narrow (:func:`passing_axes` lists them), everything that
is not shown to pass is pinned, and the pins of such an operator say that its rule is an experiment.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

__all__ = ["Passing", "passing_axes"]

_MOST_ENTRIES = 1 << 18
_DRAWS = ("normal", "ties", "positive", "large", "tiny", "special")
_RANDOM = (torch.Tag.nondeterministic_seeded, torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output)
_EXACT, _ROUNDED = 1e-9, 1e-4
"""Differences, relative to the largest entry, that are rounding in float64, and in the precision of the trace."""


@dataclass(frozen=True)
class Passing:
    """An axis that passes through an operator.

    Attributes:
        operands: the axis of each tensor operand that moves along, ``None`` where an operand has none.
        results: the axis of each result that moves, ``None`` where a result stays as it is.
    """

    operands: tuple[int | None, ...]
    results: tuple[int | None, ...]


def passing_axes(node: fx.Node) -> list[Passing] | None:
    """Return the axes that a call passes along, or ``None`` if nothing may be concluded from running it.

    Nothing may be where the operator changes its operands, is random, has results whose shape or value Python reads,
    takes or gives anything but real floating tensors, is too large, or fails on random operands: integers are
    positions, and those of one draw say nothing about those of another.
    """
    target, sources = node.target, node.all_input_nodes
    if not isinstance(target, torch._ops.OpOverload) or target._schema.is_mutable:
        return None
    if any(tag in target.tags for tag in _RANDOM) or not sources:
        return None
    shapes = [_shape(s.meta.get("val")) for s in sources]
    results = pytree.tree_leaves(node.meta.get("val"))
    if any(s is None for s in shapes) or any(_shape(r) is None for r in results) or not results:
        return None
    given = [s for s in shapes if s is not None]
    run = _runner(node, sources)
    try:
        dtypes = (torch.float64, *(s.meta["val"].dtype for s in sources))
        return _tried(run, given, tuple(dict.fromkeys(dtypes)))
    except Exception:  # an operator that fails on some draw tells nothing
        return None


def _shape(value: Any) -> tuple[int, ...] | None:
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return None
    shape = tuple(int(n) for n in value.shape)
    return shape if torch.Size(shape).numel() <= _MOST_ENTRIES else None


def _runner(node: fx.Node, sources: Sequence[fx.Node]) -> Callable[[Sequence[Tensor]], list[Tensor]]:
    target: Any = node.target

    def run(operands: Sequence[Tensor]) -> list[Tensor]:
        table = dict(zip(sources, (o.clone() for o in operands), strict=True))
        args, kwargs = fx.map_arg((node.args, node.kwargs), table.__getitem__)
        with torch.no_grad():
            return pytree.tree_leaves(target(*args, **kwargs))

    return run


def _draws(shapes: Sequence[tuple[int, ...]]) -> Iterator[list[Tensor]]:
    """Yield operands: generic ones, many equal entries, positive, large, tiny, and with zeros, ones and infinities."""
    generator = torch.Generator().manual_seed(0)
    for kind in _DRAWS:
        drawn = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
        if kind == "ties":
            drawn = [t.round().clamp(-1, 1) for t in drawn]
        elif kind == "positive":
            drawn = [t.abs() + 0.1 for t in drawn]
        elif kind == "large":
            drawn = [1e3 * t for t in drawn]
        elif kind == "tiny":
            drawn = [1e-4 * t for t in drawn]
        elif kind == "special":
            special = torch.tensor([0.0, 1.0, -1.0, torch.inf, 0.5], dtype=torch.float64)
            drawn = [
                torch.where(torch.rand(t.shape, generator=generator) < 0.3,
                            special[torch.randint(5, t.shape, generator=generator)], t)
                for t in drawn
            ]  # fmt: skip
        yield drawn


def _tried(
    run: Callable[[Sequence[Tensor]], list[Tensor]],
    shapes: Sequence[tuple[int, ...]],
    dtypes: Sequence[torch.dtype],
) -> list[Passing]:
    drawn = [[t.to(dtype) for t in operands] for dtype in dtypes for operands in _draws(shapes)]
    cases = [(operands, run(operands)) for operands in drawn]
    cases = [(o, r) for o, r in cases if any(bool(torch.isfinite(t).any()) for t in r)]
    # results that never change with the operands (an operator that reads a state, say) show nothing
    if len(cases) < 2 or all(_equal(cases[0][1], results) for _, results in cases[1:]):
        return []
    if any(not _equal(results, run(operands)) for operands, results in cases):
        return []  # two identical calls differ
    found: list[Passing] = []
    taken: set[tuple[int, int]] = set()
    for moved in _candidates(shapes):
        if any((k, axis) in taken for k, axis in enumerate(moved) if axis is not None):
            continue
        size = next(shapes[k][axis] for k, axis in enumerate(moved) if axis is not None)
        fitting = [[*(d for d, n in enumerate(r.shape) if n == size), None] for r in cases[0][1]]
        for places in itertools.islice(itertools.product(*fitting), 64):
            if _holds(run, cases, moved, places, size):
                found.append(Passing(moved, places))
                taken |= {(k, axis) for k, axis in enumerate(moved) if axis is not None}
                break
    return found


def _candidates(shapes: Sequence[tuple[int, ...]]) -> Iterator[tuple[int | None, ...]]:
    """Yield which axes of the operands to move together: one alone, and all choices of equal length, fewest first."""
    several = [[None, *(d for d, n in enumerate(shape) if n > 1)] for shape in shapes]
    chosen = itertools.islice(itertools.product(*several), 512)
    fitting = [
        c for c in chosen if len({shapes[k][axis] for k, axis in enumerate(c) if axis is not None}) == 1
    ]
    yield from sorted(fitting, key=lambda c: sum(axis is not None for axis in c))


def _holds(
    run: Callable[[Sequence[Tensor]], list[Tensor]],
    cases: Sequence[tuple[list[Tensor], list[Tensor]]],
    moved: Sequence[int | None],
    places: Sequence[int | None],
    size: int,
) -> bool:
    """Try a cycle of all units and a swap of two, which generate all permutations, and a random one."""
    swap = torch.arange(size)
    swap[:2] = swap[:2].flip(0)
    drawn = torch.randperm(size, generator=torch.Generator().manual_seed(1))
    for operands, results in cases:
        for order in (torch.arange(size).roll(1), swap, drawn):
            if not _equal(_turned(results, places, order), run(_turned(operands, moved, order))):
                return False
    return True


def _turned(tensors: Sequence[Tensor], axes: Sequence[int | None], order: Tensor) -> list[Tensor]:
    return [t if d is None else t.index_select(d, order) for t, d in zip(tensors, axes, strict=True)]


def _equal(one: Sequence[Tensor], two: Sequence[Tensor]) -> bool:
    return all(_close(x, y) for x, y in zip(one, two, strict=True))


def _close(one: Tensor, two: Tensor) -> bool:
    """Compare, relative to the largest entry: a sum in another order is rounded otherwise, also where it is small."""
    finite = one[torch.isfinite(one)].abs()
    scale = float(finite.max()) if finite.numel() else 1.0
    allowed = _EXACT if one.dtype == torch.float64 else max(_ROUNDED, 16 * torch.finfo(one.dtype).eps)
    return torch.allclose(one, two, rtol=0.0, atol=allowed * scale, equal_nan=True)
