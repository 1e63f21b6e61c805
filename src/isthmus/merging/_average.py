"""Weighted averages of networks, after relabelling them if asked."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from isthmus import matching
from isthmus.batches import Batch, Batches, reusable
from isthmus.errors import DataError, IsthmusWarning, ModelError, ShapeError
from isthmus.evaluation import Relabels, check_frame, combine_states
from isthmus.losses import Loss
from isthmus.matching import Symmetry
from isthmus.moments import Refresh, averaged_buffers, averaged_statistics, buffers_note, statistics_note
from isthmus.paths import Recompute, Repair, Straight, check_repair, recompute_of, repair_of
from isthmus.replica import with_state
from isthmus.states import State, equal_states, state_of

__all__ = [
    "STRANGERS",
    "Merged",
    "Similarity",
    "averaging",
    "merge",
    "merged",
    "normalised",
    "strangers_note",
]

STRANGERS = 0.05
"""Large networks that do not share a start have less than this in common (:class:`Similarity`)."""
CHANCE = 4.0
"""Added to :data:`STRANGERS` for smaller ones, over the root of the number of entries."""
MOST_STRANGE = 0.25
ModelOrState = nn.Module | Mapping[str, Tensor]


def merge(
    models: Sequence[ModelOrState],
    weights: Sequence[float] | None = None,
    *,
    align: str | None = None,
    symmetry: Symmetry = "permutations",
    alignments: Sequence[Relabels | None] | None = None,
    batches: Batches | None = None,
    args: Any = None,
    kwargs: Mapping[str, Any] | None = None,
    refresh: Refresh = "auto",
    repair: str | None = None,
    loss: Loss | None = None,
    model: nn.Module | None = None,
) -> State:
    r"""Average networks of one architecture: :math:`\sum_k w_k\,\pi_k\theta_k \,/ \sum_k w_k`.

    The first network is the frame: the others are relabelled towards it, by ``alignments`` that were found
    before or by aligning each to the first with the method ``align``. With neither, networks are averaged as
    they are, which is right only if they share their labels (a common start, or one network's checkpoints); a pair
    whose weights have nothing in common is warned of.

    Args:
        models: two or more modules or states.
        weights: one finite, non-negative number for each, not all zero, divided by their sum; None gives all
            the same. Two networks give the point of the path between them at the second's share:
            ``isthmus.Straight(a, b).at(t)`` for ``[1 - t, t]``. Another path is merged by its own ``at(t)``.
        align: a method of :func:`isthmus.matching.align`.
        symmetry: by what it matches (see there).
        alignments: instead, one relabelling for each network after the first; None leaves one as it is.
        batches: data for aligning and for refreshing.
        args: example inputs for aligning without data, see :func:`isthmus.matching.align`.
        kwargs: example keyword inputs for the same.
        refresh: ``"batchnorm"`` recomputes running statistics on ``batches``, and ``"auto"`` does so where there are
            batches, an architecture and BatchNorm; a function takes the merged state and returns one, and of two
            networks is told ``t`` and ``ends`` if it has parameters of these names; None or ``"none"`` leaves it.
        repair: instead of a refresh, a name of :data:`isthmus.paths.REPAIRS`, also with ``+temperature``, or
            ``"auto"``: the one with the lowest loss on ``batches``, none if none helps (:func:`merged` says which it
            was). It is written into weights, biases and running statistics: the result is an ordinary state.
        loss: by which ``"auto"`` compares and a temperature is fitted (:data:`isthmus.losses.Loss`).
        model: the architecture, for ``align``, ``refresh`` and ``repair`` where no module is among ``models``.

    Returns:
        A state in the first network's dtypes with tensors of its own, averaged in float64. Integer and
        boolean buffers are the first network's. Tied tensors stay tied. Load it with ``load_state_dict``.

    Raises:
        CheckpointError: different keys, or NaN or infinite entries.
        ShapeError: different shapes, or lists of different lengths.
        DataError: fewer than two networks, unusable weights, unknown ``refresh`` or ``repair``, a symmetry without a
            method to match by it, or missing batches.
        ModelError: a module is needed and none was given, or the repair does not know how to write into it.

    Warns:
        IsthmusWarning: running statistics or other buffers are averaged and not recomputed, or networks without a
            common start are averaged without relabelling.

    Example:
        >>> import torch
        >>> merge([{"w": torch.tensor([0.0])}, {"w": torch.tensor([4.0])}], [3, 1])["w"]
        tensor([1.])
    """
    return merged(
        models,
        weights,
        align=align,
        symmetry=symmetry,
        alignments=alignments,
        batches=batches,
        args=args,
        kwargs=kwargs,
        refresh=refresh,
        repair=repair,
        loss=loss,
        model=model,
    ).state


@dataclass(frozen=True, eq=False)
class Merged:
    """A merged network, and what was done to it.

    Attributes:
        state: its tensors.
        repair: what was done, and how it was chosen; None where no repair was asked for.
    """

    state: State
    repair: Repair | None = None


def merged(
    models: Sequence[ModelOrState],
    weights: Sequence[float] | None = None,
    *,
    align: str | None = None,
    symmetry: Symmetry = "permutations",
    alignments: Sequence[Relabels | None] | None = None,
    batches: Batches | None = None,
    args: Any = None,
    kwargs: Mapping[str, Any] | None = None,
    refresh: Refresh = "auto",
    repair: str | None = None,
    loss: Loss | None = None,
    model: nn.Module | None = None,
) -> Merged:
    """Return what :func:`merge` does, and which repair it was; arguments, errors and warnings are the same."""
    require_several(len(models), "networks")
    shares = normalised(weights, len(models))
    states = [state_of(source, f"model {k}") for k, source in enumerate(models)]
    architecture = model if model is not None else next((m for m in models if isinstance(m, nn.Module)), None)
    data = None if batches is None else reusable(batches)
    if repair is not None:
        _require_one(repair, refresh)
        refresh = None
    recompute = recompute_of(refresh, architecture, data)
    if align is not None:
        if alignments is not None:
            raise DataError("Merging: give align (a method) or alignments (relabellings), not both.")
        alignments = _align_all(models, architecture, align, symmetry, data, args, kwargs)
    elif symmetry != "permutations":
        raise DataError(
            f"Merging: symmetry={symmetry!r} says by what align matches. Give align, a method, as well; an alignment "
            "knows what acts on its units."
        )
    if alignments is not None:
        states = _relabelled(states, alignments)
    between = Straight(*states, names=("model 0", "model 1")) if len(states) == 2 else None
    mixed = combine_states(states, averaging(shares)) if between is None else between.at(shares[1])
    alone = _is_one_network(states, shares)
    found: Repair | None = None
    if repair is not None:
        positional = (args,) if isinstance(args, Tensor) else tuple(args or ())
        example = Batch(positional, dict(kwargs or {})) if args is not None or kwargs else None
        found = repair_of(
            "none" if alone else repair,
            architecture,
            states,
            data,
            mix=lambda: (mixed, shares),
            example=example,
            loss=loss,
        )
    moved = alignments or [None] * (len(states) - 1)
    for note in (
        None if alone else _statistics_note(mixed, recompute, found, architecture),
        None
        if alone or callable(refresh)
        else buffers_note(averaged_buffers(architecture, states), merged=True),
        None if alone else strangers_note([_similarity(states[0], s) for s in states[1:]], shares, moved),
    ):
        if note is not None:
            warnings.warn(note, IsthmusWarning, stacklevel=3)
    if found is not None:
        return Merged(found(mixed, shares), found)
    if recompute is None or (alone and refresh == "auto"):
        return Merged(mixed)
    return Merged(recompute(mixed, shares[1], between.ends) if between else recompute(mixed))


def _require_one(repair: str, refresh: Refresh) -> None:
    """Check a repair, and that no refresh stands beside it."""
    check_repair(repair)
    if refresh not in ("auto", "none", None):
        raise DataError(
            "Merging: repair and refresh are both given, and each says what happens to the average. Leave refresh out; "
            'repair="batchnorm" recomputes running statistics.'
        )


def _is_one_network(states: Sequence[State], shares: Sequence[float]) -> bool:
    """Return whether the average is a network as it was trained: all but one have no weight, or all are equal."""
    first, *others = [state for state, share in zip(states, shares, strict=True) if share > 0]
    return all(equal_states(first, other) for other in others)


def _statistics_note(
    state: State, recompute: Recompute | None, repair: Repair | None, architecture: nn.Module | None
) -> str | None:
    """Return a note on running statistics that are averages of several networks', or None."""
    subject = state if architecture is None else architecture
    if repair is not None:
        averaged = [name for name in state if name not in repair.writes]
    else:
        averaged = state.keys() if recompute is None else recompute.leaves(state.keys())
    layers = averaged_statistics(subject, averaged)
    how = (
        "pass batches=... of training data (and model=..., the architecture, where only states are merged) with "
        'refresh="auto", or a function (on the command line --data).'
    )
    return statistics_note(layers, how, merged=True)


def strangers_note(
    similarities: Sequence[Similarity], shares: Sequence[float], moved: Sequence[object]
) -> str | None:
    """Return a note on networks that are averaged though their weights have nothing in common, or None.

    Args:
        similarities: of each network after the first to the first.
        shares: of every network.
        moved: relabellings of the networks after the first, None for none.
    """
    found = [
        f"model {k} ({similarity.value:+.2f})"
        for k, (similarity, share, move) in enumerate(
            zip(similarities, shares[1:], moved, strict=True), start=1
        )
        if similarity.strange and share > 0 and move is None
    ]
    if not found or shares[0] == 0:
        return None
    return (
        f"The weights of {', '.join(found)} have almost nothing in common with those of model 0 (in brackets "
        "how much, 1 for equal ones): the networks do not share a start, and their average, "
        'without relabelling, is likely near chance. Align first: align="weights" or alignments=[...] '
        "(on the command line --method weights or --alignment FILE)."
    )


class Similarity:
    """Similarity of the weights of two networks: the cosine over all tensors with two axes or more, as one vector.

    It is the cosine of the differences between neighbouring rows: what all rows share, such as a mean or the pixels
    that no image uses, does not depend on which unit is which, and is no common start.
    """

    def __init__(self) -> None:
        self._product = self._first = self._second = 0.0
        self._entries = 0

    def add(self, first: Tensor, second: Tensor, row: int) -> None:
        """Add flat parts of two tensors of the same place, float64, given the entries of a row."""
        one, other = (flat - flat.roll(row) for flat in (first, second))
        product, *squares = (float(x @ y) for x, y in ((one, other), (one, one), (other, other)))
        if all(map(math.isfinite, squares)):  # weights whose squares overflow say nothing
            self._product, self._first = self._product + product, self._first + squares[0]
            self._second, self._entries = self._second + squares[1], self._entries + len(first)

    @property
    def value(self) -> float:
        """The cosine, between -1 and 1; NaN where a network has no such weights, or all rows are equal."""
        norm = math.sqrt(self._first) * math.sqrt(self._second)
        return self._product / norm if norm > 0 else math.nan

    @property
    def strange(self) -> bool:
        """Whether the networks are taken not to share a start: small ones may be somewhat alike by chance."""
        return self.value < min(STRANGERS + CHANCE / math.sqrt(max(self._entries, 1)), MOST_STRANGE)


def _similarity(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> Similarity:
    found = Similarity()
    for name, tensor in first.items():
        if tensor.ndim > 1 and tensor.is_floating_point():
            own, other = (t.detach().to(tensor.device).double().flatten() for t in (tensor, second[name]))
            found.add(own, other, tensor.shape[1:].numel())
    return found


def require_several(count: int, what: str) -> None:
    """Raise unless there are two or more to be merged.

    Args:
        count: how many there are.
        what: they are, in the plural.

    Raises:
        DataError: there are fewer than two.
    """
    if count < 2:
        raise DataError(f"Merging needs two {what} or more, found {count}.")


def require_alignments(found: int, count: int, what: str) -> None:
    """Raise unless there is one alignment for each network after the first.

    Args:
        found: number of alignments.
        count: number of networks.
        what: a message calls one of them.

    Raises:
        ShapeError: the numbers do not fit.
    """
    if found != count - 1:
        raise ShapeError(
            f"Merging {count} {what}s: expected {count - 1} alignments, one for each {what} after the first, found "
            f"{found}."
        )


def normalised(weights: Sequence[float] | None, count: int) -> list[float]:
    """Return weights that sum to 1."""
    values = [1.0] * count if weights is None else [float(w) for w in weights]
    if len(values) != count:
        raise ShapeError(f"Merging {count} networks: expected {count} weights, found {len(values)}.")
    if not all(map(math.isfinite, values)) or min(values) < 0 or max(values) <= 0:
        raise DataError(f"Merging: weights must be finite, not negative and not all zero; found {values}.")
    largest = max(values)
    scaled = [w / largest for w in values]  # their sum cannot overflow
    return [w / sum(scaled) for w in scaled]


def averaging(shares: Sequence[float]) -> Callable[[list[Tensor]], Tensor]:
    """Return the weighted mean, written around the heaviest input so that equal inputs come out unchanged.

    Differences are halved before they are formed, and no other share is above one half, so nothing overflows.
    """
    centre = max(range(len(shares)), key=shares.__getitem__)

    def average(tensors: list[Tensor]) -> Tensor:
        mean = tensors[centre].clone()
        for share, tensor in zip(shares, tensors, strict=True):
            if share > 0 and tensor is not tensors[centre]:
                mean += 2 * share * (tensor / 2 - tensors[centre] / 2)
        return mean

    return average


def _align_all(
    models: Sequence[ModelOrState],
    architecture: nn.Module | None,
    method: str,
    symmetry: Symmetry,
    batches: Batches | None,
    args: Any,
    kwargs: Mapping[str, Any] | None,
) -> list[Relabels]:
    """Align every network to the first, which is loaded into a copy of the architecture if it is a state."""
    if architecture is None:
        raise ModelError(
            f"Merging states with align={method!r} runs the network: pass its architecture, a module, as "
            "model=."
        )

    frame = models[0]
    if not isinstance(frame, nn.Module):
        frame = with_state(architecture, frame)
    return [
        matching.align(
            frame, other, batches=batches, args=args, kwargs=kwargs, method=method, symmetry=symmetry
        )
        for other in models[1:]
    ]


def _relabelled(states: Sequence[State], alignments: Sequence[Relabels | None]) -> list[State]:
    require_alignments(len(alignments), len(states), "network")
    moved = [states[0]]
    for k, (state, alignment) in enumerate(zip(states[1:], alignments, strict=True), start=1):
        moved.append(state if alignment is None else state_of(alignment.apply(state), f"aligned model {k}"))
        if alignment is not None:
            check_frame(alignment, states[0])
    return moved
