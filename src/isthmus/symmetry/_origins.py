"""Where values come from: the axes of a network's tensors along which a value varies, and what was said of them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, fx

__all__ = [
    "DATA",
    "NOTHING",
    "Along",
    "Origins",
    "Multiplied",
    "Uses",
    "Word",
    "Words",
    "bent",
    "part_of",
    "shape_of",
    "spread",
    "strided",
]

Word = Literal["holds", "reads", "scales", "unknown"]
Words = Mapping[tuple[int, int, Word], None]
"""What was said of an axis: from and to which distance of positions, and the word."""


class Along(NamedTuple):
    """An axis of a tensor of the state along which a value varies: ``number`` steps of ``step`` positions.

    Only a part of an axis varies where it was reshaped: of rows ``(heads, dimensions)``, heads count the large steps.
    """

    tensor: str
    axis: int
    step: int
    number: int
    linear: bool = True


DATA = Along("", 0, 1, 0)
"""Marks the axes of data on which units sit."""
Origins = tuple[frozenset[Along], ...]
NOTHING: frozenset[Along] = frozenset()
Multiplied = tuple[frozenset[Along], frozenset[Along]]


@dataclass
class Uses:
    """What was said of the axes of the state.

    Attributes:
        words: by tensor and axis.
        products: axes over which two tensors of the state are multiplied with each other.
    """

    words: dict[tuple[str, int], dict[tuple[int, int, Word], None]] = field(
        default_factory=dict[tuple[str, int], dict[tuple[int, int, Word], None]]
    )
    products: list[Multiplied] = field(default_factory=list[Multiplied])

    def say(self, along: Along, word: Word) -> None:
        """Note a word; what is not linear in a tensor can only scale."""
        if along != DATA:
            said = word if along.linear or word == "scales" else "unknown"
            entry = (along.step, along.step * along.number, said)
            self.words.setdefault((along.tensor, along.axis), {})[entry] = None


def shape_of(node: fx.Node) -> list[int]:
    return [int(n) for n in getattr(node.meta.get("val"), "shape", ())]


def bent(alongs: Iterable[Along]) -> frozenset[Along]:
    """Return origins of a value that is not linear in them."""
    return frozenset(along if along == DATA else along._replace(linear=False) for along in alongs)


def part_of(along: Along, step: int, number: int) -> Along:
    """Return the origin of an axis that counts ``number`` steps of ``step`` positions of an axis; none at all bends."""
    if along == DATA:
        return along
    if step < 1 or number < 1:
        return along._replace(linear=False)
    return along._replace(step=along.step * step, number=number)


def spread(shape: Sequence[int], axis: int, target: Sequence[int]) -> list[tuple[int, int, int]]:
    """Return the axes of a reshaped tensor that count steps of one of its axes, with the steps and their number."""
    inner = math.prod(shape[axis + 1 :])
    outer = inner * shape[axis]
    found: list[tuple[int, int, int]] = []
    for k, size in enumerate(target):
        begin = math.prod(target[k + 1 :])
        low, high = max(inner, begin), min(outer, begin * size)
        if low < high:
            whole = low % inner == 0 and high % low == 0
            found.append((k, low // inner if whole else 0, high // low))
    return found


def strided(node: fx.Node, source: fx.Node, axis: int) -> list[list[tuple[int, int, int]]]:
    """Return, for each result of a view, the axes that count steps of one axis of its source (see :func:`spread`)."""
    value: Tensor = source.meta["val"]
    steps = [int(k == axis) for k in range(value.ndim)]
    seen = torch.empty_strided(tuple(int(n) for n in value.shape), steps, device="meta")

    def given(n: fx.Node) -> Any:
        return seen if n is source else torch.empty(n.meta["val"].shape, device="meta")

    args, kwargs = fx.map_arg((node.args, node.kwargs), given)
    with torch.no_grad():
        made: Any = node.target(*args, **kwargs)  # type: ignore[operator]
    results = made if isinstance(made, (list, tuple)) else [made]
    return [
        [(d, step, int(r.shape[d])) for d, step in enumerate(r.stride()) if step and r.shape[d] > 1]
        for r in results
    ]
