"""Points of the straight path between two states."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn

from isthmus.errors import DataError, ShapeError
from isthmus.evaluation import combine_states
from isthmus.states import State, state_of

__all__ = ["interpolate", "mixed", "path_positions"]


def interpolate(
    state_a: nn.Module | Mapping[str, Tensor],
    state_b: nn.Module | Mapping[str, Tensor],
    t: float,
    *,
    check: bool = True,
) -> State:
    r"""Return the state :math:`(1-t)\,\theta_A + t\,\theta_B`; ``t`` is the weight of B.

    Args:
        state_a: a module or state.
        state_b: a module or state with the same keys and shapes.
        t: no unit; 0 gives A and 1 gives B exactly, other finite values extrapolate.
        check: whether keys, shapes and finiteness are checked; switch off in a loop over checked states.

    Returns:
        Fresh tensors in A's dtypes, computed in float64. Integer and boolean buffers, such as
        ``num_batches_tracked``, are A's. Tied tensors stay tied.

    Raises:
        CheckpointError: different keys, or NaN or infinite entries.
        ShapeError: different shapes.
        DataError: ``t`` is not finite.

    Example:
        >>> interpolate({"w": torch.tensor([0.0])}, {"w": torch.tensor([4.0])}, 0.25)["w"]
        tensor([1.])
    """
    if not math.isfinite(t):
        raise DataError(f"Interpolating two states: expected a finite t, found {t}.")
    states = [state_of(state_a, "A"), state_of(state_b, "B")]

    def mix(pair: list[Tensor]) -> Tensor:
        return _between(pair[0], pair[1], t)

    return combine_states(states, mix, names=("A", "B"), check=check)


def mixed(
    state_a: Mapping[str, Tensor], state_b: Mapping[str, Tensor], t: float, names: Iterable[str]
) -> State:
    """Return some tensors of the state at ``t``, in A's dtypes, within one rounding of :func:`interpolate`.

    Single and double precision are mixed as they are (five times faster than in float64), half precision in
    float32. Where the ends are equal, and at ``t`` of 0 and 1, the values are exactly theirs. Tensors that hold
    no numbers to mix, such as counters, are A's, not copied.
    """
    result: State = {}
    for name in names:
        start = state_a[name]
        if not (start.is_floating_point() or start.is_complex()):
            result[name] = start
            continue
        wide = start.dtype if start.is_complex() else torch.promote_types(start.dtype, torch.float32)
        end = state_b[name].to(device=start.device, dtype=wide)
        result[name] = _between(start.to(wide), end, t).to(start.dtype)
    return result


def _between(start: Tensor, end: Tensor, t: float) -> Tensor:
    """Return ``(1 - t) start + t end``, also where the difference of the ends overflows."""
    found = torch.lerp(start, end, t)
    if bool(found.isfinite().all()):
        return found
    return torch.where(found.isfinite(), found, torch.lerp(start / 2, end / 2, t) * 2)


def path_positions(points: int | Sequence[float] | Tensor | Any) -> Tensor:
    """Return positions on a path, float64 ``(points,)``: an even grid for a number, else those given.

    Raises:
        ShapeError: fewer than two points, or not rising strictly from 0 to 1.
    """
    if isinstance(points, Integral):
        if points < 2:
            raise ShapeError(f"A line needs its two ends: expected points of 2 or more, found {points}.")
        return torch.linspace(0.0, 1.0, int(points), dtype=torch.float64)
    ts = torch.as_tensor(points, dtype=torch.float64).detach().cpu()
    rising = ts.ndim == 1 and len(ts) >= 2 and bool((ts[1:] > ts[:-1]).all())
    if not rising or float(ts[0]) != 0.0 or float(ts[-1]) != 1.0:
        raise ShapeError(f"Positions on a line must rise strictly from 0 to 1; found {ts.tolist()}.")
    return ts
