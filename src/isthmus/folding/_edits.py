"""Edits of a state's tensors: small steps, each a function of tensors as they are before it.

The value of one tensor is computed from the source alone, by the steps that change it and those that they look at, so
a state whose tensors lie in files is folded with one or two of them in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from isthmus.folding._moves import StatePart

__all__ = ["Centred", "Edits", "Filled", "MapPart", "Scaled", "Shifted", "EditStep", "along"]

_WIDE = 2**26
"""Entries of a tensor of half precision above which it is edited in float32: half a gigabyte in float64."""

LookUp = Callable[[str], Tensor]
"""From the name of a tensor to its value before the step, in float64."""


@dataclass(frozen=True)
class EditStep:
    """A change of one tensor, in place."""

    target: str

    def run(self, tensor: Tensor, look: LookUp) -> None:
        """Change the tensor.

        Args:
            tensor: float64, its own memory.
            look: gives other tensors as they are before this step.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class Filled(EditStep):
    """Set a part to a number."""

    part: StatePart
    value: float

    def run(self, tensor: Tensor, look: LookUp) -> None:
        self.part.of(tensor).fill_(self.value)


@dataclass(frozen=True)
class MapPart(EditStep):
    """Set a part to a function of itself and of other tensors."""

    part: StatePart
    function: Callable[[Tensor, LookUp], Tensor]

    def run(self, tensor: Tensor, look: LookUp) -> None:
        view = self.part.of(tensor)
        view.copy_(self.function(view.clone(), look))


@dataclass(frozen=True)
class Scaled(EditStep):
    """Multiply a weight by a factor for every channel, along one axis of it."""

    part: StatePart
    axis: int
    index: Tensor
    factors: Callable[[LookUp], Tensor]

    def run(self, tensor: Tensor, look: LookUp) -> None:
        view = self.part.of(tensor)
        vector = self.factors(look).flatten().to(view.dtype)[self.index.to(view.device)]
        view.mul_(along(view, self.axis, vector))


@dataclass(frozen=True)
class Shifted(EditStep):
    """Add to a bias what a weight makes of a constant for every channel."""

    part: StatePart
    weight: Callable[[LookUp], Tensor]
    axis: int
    index: Tensor
    constants: Callable[[LookUp], Tensor]
    bias_axes: tuple[int, ...]

    def run(self, tensor: Tensor, look: LookUp) -> None:
        weight = self.weight(look)
        vector = self.constants(look).flatten().to(weight.dtype)[self.index.to(weight.device)]
        kept = [a for a in self.bias_axes if a >= 0]
        summed = [a for a in range(weight.ndim) if a not in kept]
        product = weight * along(weight, self.axis, vector)
        shift = product.sum(summed) if summed else product
        order = sorted(kept)
        shift = shift.permute([order.index(a) for a in kept])
        view = self.part.of(tensor)
        view.add_(shift.reshape(view.shape).to(view.dtype))


@dataclass(frozen=True)
class Centred(EditStep):
    """Take the mean along an axis out of a tensor."""

    axis: int

    def run(self, tensor: Tensor, look: LookUp) -> None:
        tensor.sub_(tensor.mean(self.axis, keepdim=True))


def along(weight: Tensor, axis: int, vector: Tensor) -> Tensor:
    """Return a vector as a factor of a weight along an axis.

    A convolution in groups lists along its axis the channels of one group; the vector has those of all groups.
    """
    size = weight.shape[axis]
    shape = [-1 if k == axis else 1 for k in range(weight.ndim)]
    if len(vector) == size:
        return vector.reshape(shape)
    groups = len(vector) // size
    rows = vector.reshape(groups, size).repeat_interleave(weight.shape[0] // groups, 0)
    return rows.reshape([weight.shape[0], size, *[1] * (weight.ndim - 2)])


class Edits:
    """Steps in order.

    Args:
        steps: what is done, first to last.
    """

    def __init__(self, steps: Sequence[EditStep]) -> None:
        self.steps = tuple(steps)
        self._of: dict[str, list[int]] = {}
        for k, step in enumerate(self.steps):
            self._of.setdefault(step.target, []).append(k)

    @property
    def targets(self) -> tuple[str, ...]:
        """Names of the tensors that change."""
        return tuple(self._of)

    def value(self, state: Mapping[str, Tensor], name: str, before: int | None = None) -> Tensor:
        """Return a tensor after all steps, or after those before one of them; float64, not shared with the state.

        Args:
            state: the source.
            name: of the tensor.
            before: number of the step.
        """
        source = state[name]
        low = source.dtype.itemsize <= 2 and source.numel() > _WIDE
        made = source.detach().to(torch.float32 if low else torch.float64, copy=True).contiguous()
        for k in self._of.get(name, ()):
            if before is None or k < before:
                self.steps[k].run(made, lambda other, k=k: self.value(state, other, k))
        return made
