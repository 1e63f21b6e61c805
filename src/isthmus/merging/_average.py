"""Weighted averages of networks, after relabelling them if asked."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from isthmus import matching
from isthmus.batches import Batches, reusable
from isthmus.errors import DataError, ModelError, ShapeError
from isthmus.evaluation import Relabelling, combine_states
from isthmus.moments._normalisation import Refresh, refresher
from isthmus.replica import with_state
from isthmus.states import State, state_of

__all__ = ["merge"]

Source = nn.Module | Mapping[str, Tensor]


def merge(
    models: Sequence[Source],
    weights: Sequence[float] | None = None,
    *,
    align: str | None = None,
    alignments: Sequence[Relabelling | None] | None = None,
    batches: Batches | None = None,
    args: Any = None,
    kwargs: Mapping[str, Any] | None = None,
    refresh: Refresh = None,
    model: nn.Module | None = None,
) -> State:
    r"""Average networks of one architecture: :math:`\sum_k w_k\,\pi_k\theta_k \,/ \sum_k w_k`.

    The first network is the frame: the others are relabelled towards it, by ``alignments`` that were found
    before or by aligning each to the first with the method ``align``. With neither, networks are averaged as
    they are, which is right only if they share their labels (a common start, or one network's checkpoints).

    Args:
        models: two or more modules or states.
        weights: one finite, non-negative number for each, not all zero, divided by their sum; None gives all
            the same. ``[1 - t, t]`` is the point ``t`` of the line from the first to the second.
        align: a method of :func:`isthmus.matching.align`.
        alignments: instead, one relabelling for each network after the first; None leaves one as it is.
        batches: data for aligning and for refreshing.
        args: example inputs for aligning without data, see :func:`isthmus.matching.align`.
        kwargs: example keyword inputs for the same.
        refresh: ``"batchnorm"`` recomputes running statistics on ``batches``; a function takes the merged
            state and returns one.
        model: the architecture, for ``align`` and ``refresh`` where no module is among ``models``.

    Returns:
        A state in the first network's dtypes with tensors of its own, averaged in float64. Integer and
        boolean buffers are the first network's. Tied tensors stay tied. Load it with ``load_state_dict``.

    Raises:
        CheckpointError: different keys, or NaN or infinite entries.
        ShapeError: different shapes, or lists of different lengths.
        DataError: fewer than two networks, unusable weights, unknown ``refresh``, or missing batches.
        ModelError: a module is needed and none was given.

    Example:
        >>> import torch
        >>> merge([{"w": torch.tensor([0.0])}, {"w": torch.tensor([4.0])}], [3, 1])["w"]
        tensor([1.])
    """
    if len(models) < 2:
        raise DataError(f"Merging needs two networks or more, found {len(models)}.")
    shares = _normalised(weights, len(models))
    states = [state_of(source, f"model {k}") for k, source in enumerate(models)]
    architecture = model if model is not None else next((m for m in models if isinstance(m, nn.Module)), None)
    data = None if batches is None else reusable(batches)
    finish = refresher(refresh, architecture, data)
    if align is not None:
        if alignments is not None:
            raise DataError("Merging: give align (a method) or alignments (relabellings), not both.")
        alignments = _align_all(models, architecture, align, data, args, kwargs)
    if alignments is not None:
        states = _relabelled(states, alignments)
    merged = combine_states(states, _averaging(shares))
    return merged if finish is None else finish(merged)


def _normalised(weights: Sequence[float] | None, count: int) -> list[float]:
    """Return weights that sum to 1."""
    values = [1.0] * count if weights is None else [float(w) for w in weights]
    if len(values) != count:
        raise ShapeError(f"Merging {count} networks: expected {count} weights, found {len(values)}.")
    if not math.isfinite(sum(values)) or min(values) < 0 or sum(values) <= 0:
        raise DataError(f"Merging: weights must be finite, not negative and not all zero; found {values}.")
    return [w / sum(values) for w in values]


def _averaging(shares: Sequence[float]) -> Callable[[list[Tensor]], Tensor]:
    """Return the weighted mean, written around the heaviest input so that equal inputs come out unchanged."""
    centre = max(range(len(shares)), key=shares.__getitem__)

    def average(tensors: list[Tensor]) -> Tensor:
        mean = tensors[centre].clone()
        for share, tensor in zip(shares, tensors, strict=True):
            mean += share * (tensor - tensors[centre])
        return mean

    return average


def _align_all(
    models: Sequence[Source],
    architecture: nn.Module | None,
    method: str,
    batches: Batches | None,
    args: Any,
    kwargs: Mapping[str, Any] | None,
) -> list[Relabelling]:
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
        matching.align(frame, other, batches=batches, args=args, kwargs=kwargs, method=method)
        for other in models[1:]
    ]


def _relabelled(states: Sequence[State], alignments: Sequence[Relabelling | None]) -> list[State]:
    if len(alignments) != len(states) - 1:
        raise ShapeError(
            f"Merging {len(states)} networks: expected {len(states) - 1} alignments, one for each network "
            f"after the first, found {len(alignments)}."
        )
    moved = [states[0]]
    for k, (state, alignment) in enumerate(zip(states[1:], alignments, strict=True), start=1):
        moved.append(state if alignment is None else state_of(alignment.apply(state), f"aligned model {k}"))
    return moved
