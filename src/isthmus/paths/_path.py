"""The protocol of paths, and the straight path."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from isthmus.errors import DataError, ModelError, printable
from isthmus.evaluation import combine_states, relative_difference
from isthmus.states import State, check_finite, check_same_architecture, state_of

__all__ = ["Path", "Straight", "interpolate", "mixed", "require_members", "require_path"]

_MEMBERS = ("ends", "straight", "at")
_TRIED = 0.3
"""Where tensors named straight are looked at: off the middle, which a path that runs unevenly may pass in time."""


@runtime_checkable
class Path(Protocol):
    r"""States from one network to another of the same architecture, one for each ``t`` between 0 and 1.

    Whatever has these three members is a path: write a class of your own, without a base class, wrap it in
    :class:`Refreshed` or :class:`Repaired` if you like, and measure it with
    :func:`isthmus.connectivity.line_along`. The law is that ``at(0)`` and ``at(1)`` are the ends (integer buffers
    apart), and that ``at`` changes nothing and returns the same for the same ``t``.

    Example:
        >>> class Bezier:
        ...     straight = ()
        ...     def __init__(self, a, bend, b):
        ...         self.ends, self.bend = (a, b), bend
        ...     def at(self, t):
        ...         a, b = self.ends
        ...         return {k: (1 - t) ** 2 * a[k] + 2 * t * (1 - t) * self.bend[k] + t**2 * b[k] for k in a}
        >>> isinstance(Bezier({}, {}, {}), Path)
        True
    """

    @property
    def ends(self) -> tuple[State, State]:
        """The states at ``t`` of 0 and of 1, as the networks were trained."""
        ...

    @property
    def straight(self) -> Collection[str]:
        r"""Names of tensors :math:`\theta` with :math:`\theta_t=(1-t)\theta_0+t\theta_1` at every ``t``.

        A line shares work between points where it knows this: a layer on the data is then run at the ends only, and
        tensors that are needed are mixed without asking for the whole state. Nothing is lost by leaving names
        out: ``()`` says that nothing is known.
        """
        ...

    def at(self, t: float) -> State:
        """Return the state at ``t``, with the names and shapes of the ends; the caller may change its tensors."""
        ...


class Straight:
    r"""The straight path :math:`\theta_t=(1-t)\,\theta_A+t\,\theta_B`; ``t`` is the weight of B.

    Args:
        a: a module or state.
        b: a module or state with the same keys and shapes; whatever relabels it comes before.
        names: how errors call the two.
        check: whether keys, shapes and finiteness are checked; not needed for states that were.

    Raises:
        CheckpointError: different keys, or NaN or infinite entries.
        ShapeError: different shapes.

    Example:
        >>> Straight({"w": torch.tensor([0.0])}, {"w": torch.tensor([4.0])}).at(0.25)["w"]
        tensor([1.])
    """

    def __init__(
        self,
        a: nn.Module | Mapping[str, Tensor],
        b: nn.Module | Mapping[str, Tensor],
        *,
        names: tuple[str, str] = ("A", "B"),
        check: bool = True,
    ) -> None:
        self._ends = state_of(a, names[0]), state_of(b, names[1])
        if check:
            check_same_architecture(*self._ends, *names)
            for state, name in zip(self._ends, names, strict=True):
                check_finite(state, name)

    @property
    def ends(self) -> tuple[State, State]:
        """The two states; their tensors share memory with what was given."""
        return self._ends

    @property
    def straight(self) -> Collection[str]:
        """All names."""
        return self._ends[0].keys()

    def at(self, t: float) -> State:
        """Return the state at ``t``, any finite number; see :func:`interpolate`."""
        return interpolate(*self._ends, t, check=False)


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


def require_members(path: object) -> Path:
    """Return what was given, if it has the members of a path.

    Raises:
        ModelError: it has not.
    """
    if isinstance(path, Path):
        return path
    lacking = ", ".join(name for name in _MEMBERS if not hasattr(path, name))
    raise ModelError(
        f"Expected a path, found {type(path).__name__}, which lacks {lacking}. A path has ends (two states), straight "
        "(names of tensors on the straight line, () where nothing is known) and at(t), a state; "
        "isthmus.Straight(a, b) is one."
    )


def require_path(path: object) -> Path:
    """Return the path, if it has the members of one and keeps its word at three positions.

    Raises:
        ModelError: a member is missing, ``at(0)`` or ``at(1)`` is another state than the end, or ``straight`` names
            what is no tensor of the ends, or not on the straight line.
        CheckpointError, ShapeError: the ends are of different architectures, or have NaN or infinite entries.
    """
    path = require_members(path)
    ends = tuple(state_of(end, f"the path's end at t = {k}") for k, end in enumerate(path.ends))
    if len(ends) != 2:
        raise ModelError(f"Expected a path with two ends, found {len(ends)}.")
    for t, end in enumerate(ends):
        name = f"the path's end at t = {t}"
        check_same_architecture(ends[0], end, "the path's end at t = 0", name)
        check_finite(end, name)
    unknown = [name for name in path.straight if name not in ends[0]]
    if unknown:
        raise ModelError(
            f"The path names {unknown[0]!r} among its straight tensors, which its ends do not have. "
            "Give names of tensors of the state, or ()."
        )
    for t, end in enumerate(ends):
        _require_near(
            path.at(float(t)), end, t, f"ends[{t}], since the ends' losses are the chord of the barrier"
        )
    between = mixed(*ends, _TRIED, path.straight)
    _require_near(
        path.at(_TRIED),
        between,
        _TRIED,
        "the mix of the ends' where straight names it; leave the name out of it",
    )
    return path


def _require_near(state: Mapping[str, Tensor], wanted: State, t: float, word: str) -> None:
    """Refuse a path whose floating tensors are not those wanted at a position, rounding apart."""
    for name, tensor in wanted.items():
        if not tensor.is_floating_point():
            continue
        difference = relative_difference(tensor, state[name]) if name in state else math.inf
        if difference > torch.finfo(tensor.dtype).eps ** 0.5:
            raise ModelError(
                f"The path at t = {t:g}: {printable(name)!r} differs by {difference:.2g} of its largest entry from "
                f"what it should be: {word}."
            )


def _between(start: Tensor, end: Tensor, t: float) -> Tensor:
    """Return ``(1 - t) start + t end``, also where the difference of the ends overflows."""
    found = torch.lerp(start, end, t)
    if bool(found.isfinite().all()):
        return found
    return torch.where(found.isfinite(), found, torch.lerp(start / 2, end / 2, t) * 2)
