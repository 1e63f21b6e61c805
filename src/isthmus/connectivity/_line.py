"""Measuring the straight line between two networks: the front door."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from isthmus.batches import Batch, Batches, reusable
from isthmus.connectivity._along import (
    PathOptions,
    deterministic,
    measured,
    prepared,
    statistics_left,
    warned,
)
from isthmus.connectivity._curve import MIDPOINT, Line
from isthmus.connectivity._networks import EndB
from isthmus.connectivity._output import name_of_scored, reader
from isthmus.errors import DataError, ModelError, VerificationError
from isthmus.evaluation import (
    Relabels,
    bind,
    checked_ends,
    relative_difference,
)
from isthmus.losses import Loss, completed_batches
from isthmus.moments import Refresh, averaged_buffers, buffers_note, chosen_refresh
from isthmus.paths import Path, Recompute, Refreshed, Straight, refreshed, repair_of
from isthmus.replica import Replica, differences, different_code
from isthmus.states import State, equal_states
from isthmus.symmetry import Outputs

__all__ = ["line"]

_TEST_NAMES = {"test", "testing", "val", "valid", "validation", "eval", "evaluation", "dev", "holdout"}
_HOW = 'refresh="batchnorm" (--refresh batchnorm) with training data, or a function for other layers than BatchNorm.'
ENDPOINT_TOLERANCE = 1e-3


def line(
    model_a: nn.Module,
    model_b: nn.Module | Mapping[str, Tensor],
    batches: Batches | Mapping[str, Batches],
    *,
    points: int | Sequence[float] | Tensor | str = 11,
    tolerance: float = 1e-3,
    lipschitz: float | None = None,
    loss: Loss | None = None,
    outputs: Outputs = None,
    refresh: Refresh = "auto",
    refresh_batches: Batches | None = None,
    repair: str | None = None,
    alignment: Relabels | None = None,
    precision: str | None = None,
    bootstrap: int = 200,
    generator: torch.Generator | None = None,
) -> Line:
    r"""Measure loss, accuracy, barrier and LMC error on the line :math:`\theta_t=(1-t)\theta_A+t\theta_B`.

    With an ``alignment`` the path leads to the relabelled B, but the losses at its ends are always those of
    the **original** networks: an endpoint damaged by a wrong relabelling would else lift the chord and hide
    the barrier. On the first 64 examples of each data set the outputs of the original B and of the path's end
    are compared; a difference is an error. Without an alignment, B is run in A's code if the two agreed there to
    the last bit.

    Data are loaded and moved once and every point is run on them. Networks that :mod:`torch.fx` can trace are run
    as described in :mod:`isthmus.connectivity._engine`, once this has been seen to agree with their own code on
    the first 32 examples; others by their own code, and ``settings["evaluation"]`` says why. Weights of
    interior points are made once and kept if they fit in 1 GiB together, or were refreshed; else they are made
    anew for each batch. Outputs of the ends are kept for adaptive points while they fit in 256 MiB.

    Args:
        model_a: a module in evaluation mode; its code also runs the interior points.
        model_b: another of the same architecture, or only its state.
        batches: one iterable of batches with targets (:mod:`isthmus.batches`), or several by name, such as
            ``{"train": ..., "test": ...}``.
        points: number of evenly spaced positions, 2 or more, or the positions themselves, rising from 0 to 1, or
            ``"adaptive"``: 7 even positions, then more where the loss may rise highest, on any data set, until
            ``barrier_uncertainty`` is at most ``tolerance`` or there are 51. The data are then held in memory.
            ``t = 0.5`` is measured in any case.
        tolerance: for adaptive points, in units of the loss.
        lipschitz: a bound, per unit of ``t``, on the slope of the loss minus its chord, if one is known; it turns
            ``barrier_uncertainty`` from an estimate into a bound.
        loss: see :data:`isthmus.losses.Loss`. By default a network of transformers whose batches have labels is
            measured by the loss that it computes itself, and any other by cross-entropy. A loss that is not that of
            each example by itself gets the batches as they are given, at every point.
        outputs: name or position of the one output that is scored and compared, as in :func:`isthmus.align`, for a
            network that returns several; by default ``logits``, else the first. A loss that the network computes
            itself reads what it reads.
        refresh: what happens to the state of an *interior* point before it is run. ``"batchnorm"`` recomputes
            running statistics, and ``"auto"`` does so for networks with BatchNorm; a function takes a state and
            returns one, and is told ``t`` and ``ends`` if it has parameters of these names; None or ``"none"`` leaves
            it. The ends stay as they were trained. Other paths are measured by :func:`line_along`.
        refresh_batches: training data for ``"batchnorm"`` and ``repair``; by default the data set named ``train``, else
            the first that is not named as test data, else the first.
        repair: what is done, instead of a refresh, so that *interior* points do better: a name of
            :data:`isthmus.paths.REPAIRS`, also with ``+temperature``, or ``"auto"``: the one with the lowest loss at
            the midpoint on the training data, none if none helps. ``settings`` say which it was. The ends stay as they
            were trained, so a temperature lowers the line and not the chord.
        alignment: relabelling of B, with ``apply(state) -> state``.
        precision: ``"bfloat16"`` computes the products of float32 networks, ends included, in bfloat16 (about
            three digits; ``docs/line.md`` gives the error measured); None computes in the networks' dtype.
        bootstrap: number of resamples for the standard errors; 0 for none.
        generator: source of the resampling; None seeds one with 0.

    Returns:
        A :class:`Line`; print it for a table. Its ``notes`` say what is easily misread: endpoints near chance,
        running statistics that were not recomputed, or on test data. Each is an
        :class:`isthmus.errors.IsthmusWarning` too.

    Raises:
        ModelError: training mode, random outputs, NaN or infinite losses, or a B whose code differs from A's.
        CheckpointError, ShapeError: different architectures, or NaN or infinite weights.
        VerificationError: the alignment changes the function of B by more than 1e-3 relative (16 roundings in
            half precision).
        DataError: empty data, no targets, labels out of range, or an option without meaning.

    Example:
        >>> net, data = nn.Linear(2, 3).eval(), [(torch.ones(4, 2), torch.tensor([0, 1, 2, 0]))]
        >>> line(net, net, {"test": data}, points=3).barrier
        0.0
    """
    grid = PathOptions(points, tolerance, lipschitz, loss, outputs, precision, bootstrap, generator)
    states = checked_ends(model_a, model_b, alignment, "Measuring a line")
    grid.require_precision(states[0])
    data = prepared(model_a, batches, grid)
    if refresh_batches is not None:
        refresh_batches = completed_batches(model_a, refresh_batches)
    replica = Replica(model_a)
    other = Replica(model_b) if isinstance(model_b, nn.Module) else None
    straight = Straight(states[0], states[2], check=False)
    if repair is None:
        path, used, notes = _with_refresh(straight, refresh, replica, data.batches, refresh_batches)
        mended: dict[str, Any] = {}
    else:
        _require_one(refresh)
        path, mended, notes = _with_repair(straight, repair, replica, data.batches, refresh_batches, grid)
        used = None
    if equal_states(*straight.ends):  # every point is the network as it was trained
        notes.clear()
        path, used = (straight, None) if refresh == "auto" or repair is not None else (path, used)
        mended = {"repair": "none"} if mended else {}
    elif not callable(used):
        buffers = buffers_note(averaged_buffers(model_a, straight.ends), merged=False)
        notes += [] if buffers is None else [buffers]
    for letter, network in (("A", replica), ("B", other)):
        if network is not None:
            deterministic(network, data, grid, name=f"Model {letter}")
    read = grid.compared(model_a)
    error = max(_compared_ends(replica, other, states, e, alignment, read) for e in data.examples.values())
    same = states[2] is states[1] and error == 0.0
    settings = {
        "refresh": "none" if used is None else _name(used),
        **mended,
        "alignment": "none" if alignment is None else getattr(alignment, "method", type(alignment).__name__),
    }
    found = measured(path, replica, EndB(states[1], other, error, same), data, grid, settings, notes)
    return warned(found)


def _with_refresh(
    straight: Straight, refresh: Refresh, replica: Replica, data: dict[str, Batches], given: Batches | None
) -> tuple[Path, Refresh, list[str]]:
    """Return the path with its refresh, the name of that, and notes on it.

    A data set that serves is made reusable in ``data``.
    """
    chosen = _training_name(data)
    used = chosen_refresh(refresh, replica.source, data[chosen])
    notes: list[str] = []
    if used != "batchnorm":
        if given is not None and refresh != "auto":
            raise DataError('refresh_batches was given, but only refresh="batchnorm" uses it.')
        path = refreshed(straight, used, replica)
    else:
        if given is None:
            given = data[chosen] = reusable(data[chosen])
            if _is_test(chosen):
                notes.append(
                    f"The running statistics of interior points were recomputed on {_judged(chosen)}"
                )
        path = refreshed(straight, refresh, replica, given)
    return path, used, notes + statistics_left(path, replica.source, _HOW)


def _require_one(refresh: Refresh) -> None:
    """Refuse a refresh beside a repair."""
    if refresh not in ("auto", "none", None):
        raise DataError(
            f"Measuring a line: repair and refresh={_name(refresh)!r} are both given, and each says what happens to "
            'interior points. Leave refresh out; repair="batchnorm" recomputes running statistics.'
        )


def _with_repair(
    straight: Straight,
    repair: str,
    replica: Replica,
    data: dict[str, Batches],
    given: Batches | None,
    grid: PathOptions,
) -> tuple[Path, dict[str, Any], list[str]]:
    """Return the path with its repair, settings that name it, and notes on it.

    A data set that serves is made reusable in ``data``.
    """
    chosen, notes = _training_name(data), list[str]()
    if given is None:
        given = data[chosen] = reusable(data[chosen])
        if _is_test(chosen) and repair not in ("none", "data-free"):
            notes.append(f"The interior points were repaired with {_judged(chosen)}")
    found = repair_of(
        repair,
        replica,
        straight.ends,
        given,
        mix=lambda: (straight.at(MIDPOINT), (1 - MIDPOINT, MIDPOINT)),
        loss=grid.loss,
        read=reader(grid.outputs),
    )
    path: Path = Refreshed(straight, Recompute(found.on_path, found.writes)) if found.steps else straight
    settings: dict[str, Any] = {"repair": found.name}
    if found.losses:
        settings |= {"repair_losses": {k: round(v, 6) for k, v in found.losses.items()}}
    return path, settings, notes + statistics_left(path, replica.source, _HOW)


def _training_name(data: Mapping[str, Batches]) -> str:
    """Return the data set named ``train``, else the first that is not named as test data, else the first."""
    named = (name for name in ("train", *data) if name in data and not _is_test(name))
    return next(named, next(iter(data)))


def _judged(name: str) -> str:
    return (
        f"{name!r}, data that the networks are also judged by. Give the training data as refresh_batches=..., or as a "
        "data set named 'train'."
    )


def _is_test(name: str) -> bool:
    """Tell whether a data set's name says that it is not for training."""
    return bool(_TEST_NAMES & set(re.split(r"[^a-z]+", name.lower())))


def _compared_ends(
    replica_a: Replica,
    replica_b: Replica | None,
    states: tuple[State, State, State],
    examples: Batch,
    alignment: Relabels | None,
    read: Callable[[Any], Tensor],
) -> float:
    """Return how far the original B and the path's end differ, or raise if that is no rounding error."""
    _, state_b, end = states
    if end is state_b and replica_b is None:
        return 0.0
    original = bind(replica_a, state_b, read) if replica_b is None else bind(replica_b, read=read)
    reached = bind(replica_a, end, read)(examples)
    error = relative_difference(original(examples), reached)
    if error <= max(ENDPOINT_TOLERANCE, 16 * torch.finfo(reached.dtype).eps):
        return error
    if alignment is not None:
        _refuse_another_output(alignment, bind(replica_a, end, lambda output: output)(examples), read)
    if replica_b is None or (alignment is not None and not differences(replica_a.source, replica_b.source)):
        raise VerificationError(
            f"The alignment changes the function of B: outputs differ by {error:.2g} of the largest one. "
            "A barrier measured with it would be wrong. Was the spec discovered on this architecture, and "
            "verified?"
        )
    how = f"outputs differ by {error:.2g} of the largest one"
    raise ModelError(different_code(replica_a.source, replica_b.source, how))


def _refuse_another_output(alignment: Relabels, output: Any, read: Callable[[Any], Tensor]) -> None:
    """Refuse to score an output that an alignment was not asked to preserve."""
    preserved = getattr(getattr(alignment, "spec", None), "outputs", None)
    scored = name_of_scored(output, read(output))
    if preserved is not None and scored is not None and scored not in preserved:
        raise VerificationError(
            f"The alignment preserves {', '.join(map(repr, preserved))} alone of the network's outputs, and {scored!r} "
            "is scored, which it changes. Say with outputs= (on the command line --outputs) that what it preserves is "
            f"scored, or align again so that {scored!r} is preserved."
        )


def _name(value: object) -> str:
    return value if isinstance(value, str) else getattr(value, "__name__", type(value).__name__)
