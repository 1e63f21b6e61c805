"""ShuffleNet of the second kind: channels split in halves, one half worked on, then both shuffled; with its symmetry.

Source: Ma et al. 2018, figure 3 (c) and (d). Written from the paper.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from isthmus.errors import ModelError
from isthmus.networks._plain import scaled
from isthmus.networks._reference import ReferenceGroup, ReferenceSlot, TensorAxis, columns, norm, rows

__all__ = ["shufflenet", "shufflenet_reference"]

_WIDTHS = (24, 116, 232, 464, 1024)


def _pointwise(inputs: int, outputs: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU())


def _depthwise(channels: int, stride: int) -> nn.Module:
    conv = nn.Conv2d(channels, channels, 3, stride, 1, groups=channels, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(channels))


def _branch(inputs: int, outputs: int, stride: int) -> nn.Module:
    layers = {
        "enter": _pointwise(inputs, outputs),
        "depthwise": _depthwise(outputs, stride),
        "leave": _pointwise(outputs, outputs),
    }
    return nn.Sequential(OrderedDict(layers))


def _shuffled(left: Tensor, right: Tensor) -> Tensor:
    """Put two halves together so that their channels take turns."""
    batch, channels, height, width = left.shape
    both = torch.cat([left, right], 1).view(batch, 2, channels, height, width)
    return both.transpose(1, 2).reshape(batch, 2 * channels, height, width)


class _ShuffleUnit(nn.Module):
    """Work on the second half of the channels (figure 3 c)."""

    def __init__(self, half: int) -> None:
        super().__init__()
        self.branch = _branch(half, half, 1)

    def forward(self, x: Tensor) -> Tensor:
        left, right = x.chunk(2, 1)
        return _shuffled(left, self.branch(right))


class _DownUnit(nn.Module):
    """Work on all channels twice, and halve the image (figure 3 d)."""

    def __init__(self, inputs: int, half: int) -> None:
        super().__init__()
        self.left = nn.Sequential(
            OrderedDict(depthwise=_depthwise(inputs, 2), leave=_pointwise(inputs, half))
        )
        self.branch = _branch(inputs, half, 2)

    def forward(self, x: Tensor) -> Tensor:
        return _shuffled(self.left(x), self.branch(x))


class _ShuffleNet(nn.Module):
    def __init__(self, classes: int, widths: Sequence[int], repeats: Sequence[int]) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, widths[0], 3, 2, 1, bias=False), nn.BatchNorm2d(widths[0]), nn.ReLU()
        )
        stages = [
            nn.Sequential(
                _DownUnit(inputs, outputs // 2), *(_ShuffleUnit(outputs // 2) for _ in range(units - 1))
            )
            for (inputs, outputs), units in zip(pairwise(widths[:-1]), repeats, strict=True)
        ]
        self.stages = nn.Sequential(*stages)
        self.last = _pointwise(widths[-2], widths[-1])
        self.fc = nn.Linear(widths[-1], classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.last(self.stages(self.stem(x))).mean((2, 3)))


def _checked(width: float, repeats: Sequence[int]) -> list[int]:
    if len(repeats) != 3 or min(repeats, default=0) < 1:
        raise ModelError(
            f"shufflenet: three stages of at least one unit each, found repeats={tuple(repeats)}. "
            "The network of the paper has repeats=(4, 8, 4)."
        )
    return [2 * scaled(size // 2, width) for size in _WIDTHS]


def shufflenet(classes: int = 10, width: float = 1.0, repeats: Sequence[int] = (4, 8, 4)) -> nn.Module:
    """Build a ShuffleNet V2: images of (3, height, width) in, logits of (classes) out.

    Args:
        classes: number of outputs.
        width: factor on the channels of the paper's network of factor 1 (116, 232 and 464 in its stages).
        repeats: units of each of the three stages.

    Raises:
        ModelError: another number of stages, or an empty one.
    """
    return _ShuffleNet(classes, _checked(width, repeats), repeats)


def shufflenet_reference(width: float = 1.0, repeats: Sequence[int] = (4, 8, 4)) -> list[ReferenceGroup]:
    """Write down the symmetry of :func:`shufflenet`.

    A channel is made by one layer and read by one: of the two halves that meet in a unit, the second one is worked on,
    the first one only finds another place. So the units of a group are the channels that one layer makes and one unit
    reads, wherever they stand there.

    Raises:
        ModelError: another number of stages, or an empty one.
    """
    widths = _checked(width, repeats)
    groups: list[ReferenceGroup] = []
    made = [_Made(_layer("stem"), {u: u for u in range(widths[0])})]
    for stage, units in enumerate(repeats):
        half = widths[stage + 1] // 2
        for unit in range(units):
            name = f"stages.{stage}.{unit}"
            readers = columns(f"{name}.branch.enter.0")
            if unit == 0:
                readers += (*_layer(f"{name}.left.depthwise"), *columns(f"{name}.left.leave.0"))
            groups += _read(made, readers, name, first=half if unit else 0)
            groups.append(_inside(f"{name}.branch", half))
            passed = [_Made(m.places, {u: 2 * p for u, p in m.at.items() if p < half}) for m in made if unit]
            if unit == 0:
                passed = [_Made(_layer(f"{name}.left.leave"), {u: 2 * u for u in range(half)})]
            new = _Made(_layer(f"{name}.branch.leave"), {u: 2 * u + 1 for u in range(half)})
            made = [*passed, new]
    groups += _read(made, columns("last.0"), "last", first=0)
    last = [_Made(_layer("last"), {u: u for u in range(widths[-1])})]
    groups += _read(last, columns("fc"), "fc", first=0)
    return groups


@dataclass(frozen=True)
class _Made:
    """Channels that one layer makes: where the layer keeps them, and where each of them stands at present."""

    places: tuple[TensorAxis, ...]
    at: Mapping[int, int]


def _layer(name: str) -> tuple[TensorAxis, ...]:
    return (*rows(f"{name}.0", bias=False), *norm(f"{name}.1"))


def _inside(branch: str, half: int) -> ReferenceGroup:
    """Return the channels inside a branch: made by its first layer, filtered one by one, read by its last."""
    places = (*_layer(f"{branch}.enter"), *_layer(f"{branch}.depthwise"), *columns(f"{branch}.leave.0"))
    return ReferenceGroup(branch, half, tuple(ReferenceSlot(*place) for place in places))


def _read(
    made: Sequence[_Made], readers: Sequence[TensorAxis], name: str, first: int
) -> list[ReferenceGroup]:
    """Return one group for every layer of which some channels stand at position ``first`` or later."""
    groups: list[ReferenceGroup] = []
    for source in made:
        read = {unit: place - first for unit, place in source.at.items() if place >= first}
        if len(read) > 1:
            slots = [*_slots(source.places, list(read)), *_slots(readers, list(read.values()))]
            groups.append(ReferenceGroup(f"{source.places[0][0]} in {name}", len(read), tuple(slots)))
    return groups


def _slots(places: Sequence[TensorAxis], positions: Sequence[int]) -> list[ReferenceSlot]:
    return [ReferenceSlot(*place, positions[0], positions[1] - positions[0]) for place in places]
