"""Inputs and states that make ties: what verification must also see where a network ranks numbers.

On random inputs no two entries are equal, and a network that takes the first of several equal ones looks as if their
order did not matter. So a network that ranks is also run where entries are equal: on zeros, constants, duplicated
examples, large values that saturate, small ones that are rounded away, and with shifts that kill what follows them.
No trial gives two units of a parameter equal values: a symmetry may rely on their being different.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["TRIALS", "RankingSeen", "Trial", "nudged"]

_LARGE, _SMALL, _SHIFT = 30.0, 1e-3, 1e3
_NUDGE = 1e-12


class RankingSeen(TorchDispatchMode):
    """Notes whether a network makes integers from numbers or truth values: places in an order, or counts.

    A number that Python reads from a tensor counts too: code may go another way where it is another one. Plain
    pooling makes places as well, but only keeps the greatest numbers; they matter where something is unpooled.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seen = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func._schema.name
        if (
            name == "aten::_local_scalar_dense"
            or "unpool" in name
            or ("pool" not in name and _counts((args, kwargs), result))
        ):
            self.seen = True
        return result


def _counts(read: Any, made: Any) -> bool:
    results = [t for t in pytree.tree_leaves(made) if isinstance(t, Tensor)]
    operands = [t for t in pytree.tree_leaves(read) if isinstance(t, Tensor)]
    return any(_integer(t) for t in results) and any(not _integer(t) for t in operands)


def _integer(value: Tensor) -> bool:
    return not (value.is_floating_point() or value.is_complex() or value.dtype == torch.bool)


@dataclass(frozen=True)
class Trial:
    """A change of all inputs (tensor to tensor) and of all shifts (parameters with one axis that are no gains)."""

    name: str
    on_input: Callable[[Tensor], Tensor]
    on_shift: Callable[[Tensor], Tensor]

    def inputs(self, given: Any) -> Any:
        """Return the inputs changed; masks stay as they are."""
        return pytree.tree_map(self._changed, given)

    def state(self, state: Mapping[str, Tensor], shifts: set[str]) -> dict[str, Tensor]:
        """Return the state with the named tensors changed; tied ones stay tied."""
        moved = {id(state[name]): self.on_shift(state[name]) for name in shifts}
        return {name: moved.get(id(value), value) for name, value in state.items()}

    def _changed(self, value: Any) -> Any:
        if not isinstance(value, Tensor) or value.numel() == 0 or value.dtype == torch.bool:
            return value
        if value.is_floating_point():
            return self.on_input(value)
        return _alike(value) if self.on_input is _alike else value


def nudged(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a state changed by as much as rounding changes numbers.

    Entries that are equal because something saturated stay equal. What moves the outputs now is chance: numbers that
    are equal up to rounding, whose order no relabelling preserves and no symmetry promises.
    """
    done: dict[int, Tensor] = {}
    generator = torch.Generator().manual_seed(0)
    for value in state.values():
        if id(value) not in done:
            done[id(value)] = value
            if value.is_floating_point():
                noise = torch.rand(value.shape, generator=generator, dtype=torch.float64).to(value.device)
                done[id(value)] = value * (1 + _NUDGE * noise).to(value.dtype)
    return {name: done[id(value)] for name, value in state.items()}


def _same(value: Tensor) -> Tensor:
    return value


def _alike(value: Tensor) -> Tensor:
    """Return an input whose examples, positions and (for token numbers) entries are all as the first one."""
    places = value.ndim if not value.is_floating_point() else max(value.ndim - 1, 0)
    for axis in range(places):
        value = value.narrow(axis, 0, 1).expand(value.shape)
    return value.clone()


def _by(factor: float) -> Callable[[Tensor], Tensor]:
    return lambda value: value * factor


def _shifted(by: float) -> Callable[[Tensor], Tensor]:
    return lambda value: value + by * max(1.0, float(value.abs().max())) if value.numel() else value


TRIALS = (
    Trial("zeros", torch.zeros_like, _same),
    Trial("zeros, small shifts", torch.zeros_like, _by(_SMALL)),
    Trial("small", _by(_SMALL), _by(_SMALL)),
    Trial("large", _by(_LARGE), _same),
    Trial("negated", torch.neg, _same),
    Trial("large and negative", lambda v: -_LARGE * v.abs(), _shifted(-_SHIFT)),
    Trial("large and positive", lambda v: _LARGE * v.abs(), _shifted(_SHIFT)),
    Trial("signs", torch.sign, _same),
    Trial("constant", lambda v: torch.full_like(v, float(v.double().mean())), _same),
    Trial("alike", _alike, _same),
)
