"""Repairs by name, alone and one after another, and the choice among them by the loss on training data."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from types import MappingProxyType
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from isthmus.batches import Batch, Batches, first_batch, reusable
from isthmus.errors import DataError, ModelError
from isthmus.evaluation import Evaluation, evaluate
from isthmus.losses import Loss
from isthmus.moments import keeps_running_statistics, refresh_batchnorm, statistics_names
from isthmus.paths._channels import ChannelRepair
from isthmus.paths._data_free import WeightRepair
from isthmus.paths._refreshed import LargerBatches
from isthmus.paths._temperature import Temperature
from isthmus.replica import Replica
from isthmus.states import State

__all__ = ["REPAIRS", "Repair", "check_repair", "needs_data", "repair_of"]

REPAIRS = MappingProxyType(
    {
        "none": "the mix as it is",
        "batchnorm": "running statistics recomputed",
        "repair": "mean and spread of every channel put back (REPAIR)",
        "rescale": "spread of every channel put back by a factor (RESCALE), after batchnorm",
        "data-free": "spread put back as far as weights tell it",
        "noise": "mean and spread on random inputs put back (REPAIR without data)",
    }
)
"""What may be done to a mixed network, by name. ``+temperature`` behind a name divides its logits by the temperature
that is best on training data, and ``"temperature"`` alone does only that; ``"auto"`` takes the one with the lowest
loss."""
_WITHOUT_DATA = ("data-free", "noise")
_NOISE_EXAMPLES, _NOISE_BATCHES = 256, 4
_AUTO, _TEMPERATURE = "auto", "temperature"


class _Step(Protocol):
    @property
    def writes(self) -> frozenset[str]: ...

    def __call__(self, state: State, shares: Sequence[float], where: str) -> State: ...


@dataclass(frozen=True, eq=False)
class Repair:
    """Something done to a mixed state so that it does better; call it with the state and the shares of its parents.

    Attributes:
        name: of what is done, such as ``"repair+temperature"``.
        steps: done one after another.
        losses: where it was chosen (``"auto"``), the loss of every candidate on the training data.
        refused: the candidates that the network does not allow, and why.
    """

    name: str
    steps: tuple[_Step, ...] = ()
    losses: Mapping[str, float] = field(default_factory=dict[str, float])
    refused: Mapping[str, str] = field(default_factory=dict[str, str])

    def __call__(self, state: State, shares: Sequence[float], where: str = "in the average") -> State:
        """Return the repaired state.

        Args:
            state: the mix of the parents; not changed.
            shares: of each parent, summing to 1.
            where: how messages call its place.
        """
        for step in self.steps:
            state = step(state, shares, where)
        return state

    def on_path(self, state: State, t: float) -> State:
        """Return the repaired state of a point between two networks."""
        return self(state, (1 - t, t), f"t = {t:g}")

    @property
    def writes(self) -> frozenset[str]:
        """Names of the tensors that may be changed."""
        return frozenset().union(*(step.writes for step in self.steps))

    @property
    def words(self) -> str:
        """What was done, and how it was chosen, in a sentence or two."""
        name, _, tempered = self.name.partition("+")
        said = REPAIRS[name] + (", logits divided by one temperature" if tempered else "")
        if not self.losses:
            return f"Repair: {self.name} ({said})."
        found = ", ".join(f"{name} {loss:.4g}" for name, loss in self.losses.items())
        left = "".join(f" Left out: {name} ({why})" for name, why in self.refused.items())
        return f"Repair: {self.name} ({said}), chosen by the loss on the training data: {found}.{left}"


@dataclass(frozen=True, eq=False)
class _NormRepair:
    """Running statistics recomputed on data."""

    replica: Replica
    batches: Batches

    def __call__(self, state: State, shares: Sequence[float], where: str) -> State:
        return refresh_batchnorm(self.replica, state, self.batches)

    @property
    def writes(self) -> frozenset[str]:
        return frozenset(statistics_names(self.replica.source))


def check_repair(name: object) -> tuple[str, bool]:
    """Return the repair before ``+temperature``, and whether there is that.

    Raises:
        DataError: an unknown name.
    """
    first, plus, last = name.partition("+") if isinstance(name, str) else ("", "", "")
    if first == _TEMPERATURE and not plus:
        return "none", True
    if (first not in REPAIRS and first != _AUTO) or (plus and last != _TEMPERATURE):
        raise DataError(
            f"Unknown repair {name!r}: expected one of {', '.join(REPAIRS)}, {_TEMPERATURE}, {_AUTO}, or one of them "
            f"with +{_TEMPERATURE} behind it."
        )
    return first, bool(plus)


def needs_data(name: object) -> bool:
    """Tell whether a repair needs training data, not only inputs of the right shape.

    Raises:
        DataError: an unknown name.
    """
    first, tempered = check_repair(name)
    return tempered or first not in ("none", *_WITHOUT_DATA)


def repair_of(
    name: str,
    model: nn.Module | Replica | None,
    parents: Sequence[State],
    batches: Batches | None,
    *,
    mix: Callable[[], tuple[State, Sequence[float]]],
    example: Batch | None = None,
    loss: Loss | None = None,
    read: Callable[[Any], Tensor] | None = None,
) -> Repair:
    """Return the repair of a name, ready to be used on any mix of the parents.

    Args:
        name: one of :data:`REPAIRS`, ``"temperature"``, ``"auto"``, or one with ``+temperature``.
        model: the architecture.
        parents: states of the networks that are mixed.
        batches: training data; ``"data-free"`` and ``"none"`` need none.
        mix: gives the mixed state, and its shares, at which ``"auto"`` compares.
        example: inputs on which the network can be run, for ``"data-free"`` where there are no data.
        loss: by which ``"auto"`` compares, and a temperature is fitted (:data:`isthmus.losses.Loss`).
        read: picks the output that is scored, for a temperature.

    Raises:
        DataError: an unknown name, or no data.
        ModelError: no architecture, or one that the repair does not know how to write into.
    """
    first, tempered = check_repair(name)
    if first == "none" and not tempered:
        return Repair("none")
    if model is None:
        raise ModelError(f"repair={name!r} runs the network: pass its architecture as model=, a module.")
    if batches is None and needs_data(name):
        raise DataError(
            f"repair={name!r} needs batches=... of training data; without any there are {' and '.join(_WITHOUT_DATA)}."
        )
    if batches is None and example is None:
        raise DataError(
            f"repair={name!r} runs the network on inputs of the right shape: pass example inputs as args=... or "
            "kwargs=..., or batches=..."
        )
    replica, data = Replica.of(model), None if batches is None else reusable(batches)
    make = partial(_steps, replica=replica, parents=parents, batches=data, example=example)
    last = (Temperature(replica, parents[0], data, loss=loss, read=read),) if tempered and data else ()
    ending = f"+{_TEMPERATURE}" if tempered else ""
    if first != _AUTO:
        return Repair(first + ending, (*make(first), *last))
    assert data is not None, "refused above"
    return _best(replica, data, make, last, ending, mix, partial(evaluate, loss=loss, read=read))


def _best(
    replica: Replica,
    data: Batches,
    make: Callable[[str], tuple[_Step, ...]],
    last: tuple[_Step, ...],
    ending: str,
    mix: Callable[[], tuple[State, Sequence[float]]],
    judged: Callable[..., Evaluation],
) -> Repair:
    """Return the repair with the lowest loss, of equal ones the first; what cannot be done is left out."""
    state, shares = mix()
    losses, refused = dict[str, float](), dict[str, str]()
    best: tuple[float, tuple[_Step, ...]] | None = None
    for name in REPAIRS:
        if name == "batchnorm" and not keeps_running_statistics(replica.source):
            continue
        found = state
        for label, after in {name: (), name + ending: last}.items():
            try:
                steps = (*make(name), *after)
                found = Repair(label, steps[-1:] if after else steps)(found, shares)
                value = judged(replica, data, state=found).loss
            except ModelError as error:
                refused[label] = str(error)
                break
            losses[label] = value
            if best is None or value < best[0]:
                best = value, steps
    if best is None:
        raise ModelError(f"No repair is possible: {next(iter(refused.values()))}")
    name = min(losses, key=losses.__getitem__)
    return Repair(name, best[1], losses, refused)


def _steps(
    name: str, *, replica: Replica, parents: Sequence[State], batches: Batches | None, example: Batch | None
) -> tuple[_Step, ...]:
    """Return what a repair does, one thing after another, without a temperature."""
    if name == "none":
        return ()
    if name in _WITHOUT_DATA:
        shown = example if example is not None else None if batches is None else first_batch(batches)
        assert shown is not None, "refused before"
        if name == "data-free":
            return (WeightRepair(replica, parents, shown),)
        return (ChannelRepair(replica, parents, _noise_like(shown)),)
    assert batches is not None, "refused before"
    anew = _NormRepair(replica, LargerBatches(batches))
    if name == "batchnorm":
        if not keeps_running_statistics(replica.source):
            raise ModelError(
                "repair='batchnorm' recomputes running statistics, and this network has no BatchNorm that keeps any. "
                "Try repair='repair'."
            )
        return (anew,)
    if name == "rescale":
        scale = ChannelRepair(replica, parents, batches, hold="deviation")
        return (anew, scale) if keeps_running_statistics(replica.source) else (scale,)
    return (ChannelRepair(replica, parents, batches),)


def _noise_like(example: Batch) -> list[Batch]:
    """Return batches of standard normal numbers in the shape of an example's inputs.

    Raises:
        ModelError: some inputs are no real floating numbers.
    """
    given = [*example.args, *example.kwargs.values()]
    if not given or not all(isinstance(x, Tensor) and x.is_floating_point() and x.ndim for x in given):
        raise ModelError(
            "repair='noise' draws inputs at random, and some inputs of this network are no floating numbers (tokens, "
            "masks). Give data and another repair."
        )
    generator = torch.Generator().manual_seed(0)

    def drawn(like: Tensor) -> Tensor:
        return torch.randn(_NOISE_EXAMPLES, *like.shape[1:], generator=generator).to(like)

    return [
        Batch(tuple(map(drawn, example.args)), {k: drawn(v) for k, v in example.kwargs.items()})
        for _ in range(_NOISE_BATCHES)
    ]
