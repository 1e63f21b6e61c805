"""Paths whose interior states are worked over before they are run, such as running statistics made anew."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, partial

from torch import Tensor, nn

from isthmus.batches import Batch, Batches, iterate, reusable
from isthmus.errors import DataError, ModelError
from isthmus.moments import Refresh, chosen_refresh, refresh_batchnorm, statistics_names
from isthmus.paths._path import Path, require_members
from isthmus.replica import Replica
from isthmus.states import State, check_finite, check_same_architecture, state_of

__all__ = ["Recompute", "Refreshed", "recompute_of", "refreshed"]

_TOLD = ("t", "ends")


@dataclass(frozen=True)
class Recompute:
    """A function of a state whose result is checked, called with what it asks for.

    Attributes:
        function: from a state to one of the same names and shapes. A parameter named ``t`` or ``ends``, after the first
            and without a default (or keyword-only), is given the position and the two states of the path's ends.
        writes: names of the tensors that it may change; None where that is not known.
    """

    function: Callable[..., Mapping[str, Tensor]]
    writes: frozenset[str] | None = None

    def __post_init__(self) -> None:
        if not callable(self.function):
            raise DataError(
                f"Refreshing a path: expected a function of a state, found {self.function!r}. "
                "Refreshed.batchnorm(path, model, batches) recomputes running statistics."
            )

    def __call__(
        self, state: State, t: float | None = None, ends: tuple[State, State] | None = None
    ) -> State:
        """Return the recomputed state.

        Raises:
            CheckpointError, ShapeError: it has other names or shapes, or NaN or infinite entries.
            DataError: the function asks for a position where there is none, in an average of several networks.
        """
        if self.told and ends is None:
            raise DataError(
                f"The refresh function asks for {' and '.join(self.told)}, which the average of more than two networks "
                "does not have: it is no point of a path. Merge two, or give a function of the state alone."
            )
        known = {"t": t, "ends": ends}
        found = state_of(self.function(state, **{k: known[k] for k in self.told}), "the refreshed state")
        check_same_architecture(state, found, "the state", "the refreshed state")
        check_finite(found, "the refreshed state")
        return found

    @cached_property
    def told(self) -> tuple[str, ...]:
        """Names of the arguments that the function asks for besides the state."""
        try:
            listed = list(inspect.signature(self.function).parameters.values())[1:]
        except (TypeError, ValueError):  # built in, without a signature
            return ()
        asked = {
            p.name
            for p in listed
            if p.kind is p.KEYWORD_ONLY or (p.kind is p.POSITIONAL_OR_KEYWORD and p.default is p.empty)
        }
        return tuple(name for name in _TOLD if name in asked)

    def leaves(self, names: Collection[str]) -> Collection[str]:
        """Return those of some names whose tensors it is known not to change."""
        return () if self.writes is None else [name for name in names if name not in self.writes]


class Refreshed:
    r"""A path whose states strictly between the ends are recomputed; the ends stay as they were trained.

    Args:
        path: the path that gives the states.
        recompute: a function from a state to one of the same names and shapes. If it has parameters named ``t`` or
            ``ends`` it is told the position and the two end states too, as in ``def recompute(state, t, ends)``
            (:class:`Recompute` says which count). Its result is checked at every point.

    Raises:
        ModelError: what was given is no path.
        DataError: what was given is no function.
        CheckpointError, ShapeError: (at a point) the function returns other names or shapes, NaN or infinity.

    Example:
        >>> import torch
        >>> from isthmus.paths import Straight
        >>> between = Straight({"w": torch.zeros(1)}, {"w": torch.ones(1)})
        >>> Refreshed(between, lambda state, t: {"w": state["w"] / t}).at(0.25)["w"]
        tensor([1.])
    """

    def __init__(self, path: Path, recompute: Callable[..., Mapping[str, Tensor]] | Recompute) -> None:
        self.path = require_members(path)
        self.recompute = recompute if isinstance(recompute, Recompute) else Recompute(recompute)

    @classmethod
    def batchnorm(cls, path: Path, model: nn.Module | Replica, batches: Batches) -> Refreshed:
        """Return the path with the running statistics of BatchNorm layers recomputed.

        Args:
            path: the path.
            model: the architecture.
            batches: training data, iterated again for every point; see :func:`isthmus.moments.refresh_batchnorm`.
        """
        return cls(path, _batchnorm(model, batches))

    @property
    def ends(self) -> tuple[State, State]:
        """The ends of the path, as they were trained."""
        return self.path.ends

    @property
    def straight(self) -> Collection[str]:
        """The names that were, without those that may be recomputed."""
        return self.recompute.leaves(self.path.straight)

    def at(self, t: float) -> State:
        """Return the state at ``t``, recomputed unless ``t`` is 0 or 1."""
        state = self.path.at(t)
        return state if t in (0, 1) else self.recompute(state, t, self.ends)


def refreshed(
    path: Path, refresh: Refresh, model: nn.Module | Replica | None = None, batches: Batches | None = None
) -> Path:
    """Return the path with what a refresh stands for; the path itself where that is nothing.

    Args:
        path: the path.
        refresh: see :data:`isthmus.moments.Refresh`.
        model: the architecture, for BatchNorm.
        batches: the data, for BatchNorm.

    Raises:
        DataError, ModelError: as :func:`recompute_of`.
    """
    recompute = recompute_of(refresh, model, batches)
    return path if recompute is None else Refreshed(path, recompute)


def recompute_of(
    refresh: Refresh, model: nn.Module | Replica | None, batches: Batches | None
) -> Recompute | None:
    """Return the function that ``refresh`` stands for, or None.

    Args:
        refresh: see :data:`isthmus.moments.Refresh`. ``"auto"`` leaves out batches of one example, if there are larger
            ones.
        model: the architecture, for ``"batchnorm"``.
        batches: the data, for ``"batchnorm"``; iterated again for every state.

    Raises:
        DataError: unknown name, or ``"batchnorm"`` without batches.
        ModelError: ``"batchnorm"`` without a module.
    """
    if refresh == "auto" and batches is not None:
        batches = LargerBatches(reusable(batches))
    refresh = chosen_refresh(refresh, model.source if isinstance(model, Replica) else model, batches)
    if refresh is None:
        return None
    if callable(refresh):
        return Recompute(refresh)
    if refresh != "batchnorm":
        raise DataError(
            f'Unknown refresh {refresh!r}: expected "auto", "batchnorm", None or a function of a state.'
        )
    if batches is None:
        raise DataError('refresh="batchnorm" needs batches to recompute the statistics on.')
    if model is None:
        raise ModelError('refresh="batchnorm" runs the network: pass its architecture as model=, a module.')
    return _batchnorm(model, batches)


def _batchnorm(model: nn.Module | Replica, batches: Batches) -> Recompute:
    replica = Replica.of(model)
    function = partial(refresh_batchnorm, replica, batches=reusable(batches))
    return Recompute(function, frozenset(statistics_names(replica.source)))


class LargerBatches:
    """The batches of more than one example: a last batch of one has no variance. All, where none is larger."""

    def __init__(self, batches: Batches) -> None:
        self._batches = batches

    def __iter__(self) -> Iterator[Batch]:
        larger = False
        for batch in iterate(self._batches):
            if batch.size > 1:
                larger = True
                yield batch
        if not larger:
            yield from iterate(self._batches)
