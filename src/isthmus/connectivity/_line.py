"""Measuring the straight line between two networks: the front door."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from itertools import chain, islice

import torch
from torch import Tensor, nn

from isthmus.batches import Batch, Batches, first_batch, iterate, reusable
from isthmus.connectivity._adaptive import FIRST_POINTS, MOST_POINTS, next_points
from isthmus.connectivity._curve import MIDPOINT, Line, curve_from
from isthmus.connectivity._measure import Sweep
from isthmus.connectivity._networks import Networks, traced_or_plain
from isthmus.connectivity._path import interpolate, path_positions
from isthmus.errors import DataError, IsthmusWarning, ModelError, VerificationError
from isthmus.evaluation import (
    Relabelling,
    bind,
    check_frame,
    floating_dtype,
    relative_difference,
    require_deterministic,
    require_evaluation,
)
from isthmus.losses import Loss, completed_batches, configs_kept, scorer_for
from isthmus.moments._normalisation import (
    Refresh,
    averaged_buffers,
    averaged_statistics,
    chosen_refresh,
    refresher,
    some_layers,
)
from isthmus.replica import Replica, differences, different_code
from isthmus.states import State, check_finite, check_same_architecture, equal_states, state_of

__all__ = ["line"]

_TEST_NAMES = {"test", "testing", "val", "valid", "validation", "eval", "evaluation", "dev", "holdout"}
ENDPOINT_TOLERANCE = 1e-3
ENDPOINT_EXAMPLES = 64
EXAMPLES_CHECKED = 32


def line(
    model_a: nn.Module,
    model_b: nn.Module | Mapping[str, Tensor],
    batches: Batches | Mapping[str, Batches],
    *,
    points: int | Sequence[float] | Tensor | str = 11,
    tolerance: float = 1e-3,
    lipschitz: float | None = None,
    loss: Loss | None = None,
    refresh: Refresh = "auto",
    refresh_batches: Batches | None = None,
    alignment: Relabelling | None = None,
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
        refresh: what happens to the state of an *interior* point before it is run. ``"batchnorm"`` recomputes
            running statistics, and ``"auto"`` does so for networks with BatchNorm; a function takes a state and
            returns one; None or ``"none"`` leaves it. The ends stay as they were trained.
        refresh_batches: training data for ``"batchnorm"``; by default the data set named ``train``, else the first
            that is not named as test data, else the first.
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
    adaptive = isinstance(points, str) and points == "adaptive"
    if isinstance(points, str) and not adaptive:
        raise DataError(
            f'Measuring a line: expected a number of points, positions or "adaptive", found {points!r}.'
        )
    ts = path_positions(FIRST_POINTS if adaptive else points)
    _check_options(bootstrap, tolerance, lipschitz)
    states = _checked_states(model_a, model_b, alignment)
    data: dict[str, Batches] = {
        name: completed_batches(model_a, items) for name, items in _named(batches).items()
    }
    if adaptive:
        data = {name: list(iterate(items, name)) for name, items in data.items()}
    low = _low(precision, states[0])
    if refresh_batches is not None:
        refresh_batches = completed_batches(model_a, refresh_batches)
    replica_a = Replica(model_a)
    replica_b = Replica(model_b) if isinstance(model_b, nn.Module) else None
    repair, used, notes = _repair(refresh, replica_a, data, refresh_batches)
    if equal_states(states[0], states[2]):  # every point is the network as it was trained
        notes.clear()
        repair, used = (None, None) if refresh == "auto" else (repair, used)
    elif not callable(used) and (left := averaged_buffers(model_a, [states[0], states[2]])):
        notes.append(_buffers_note(left))
    data, examples = _with_examples(data)
    for letter, replica in (("A", replica_a), ("B", replica_b)):
        if replica is not None:
            require_deterministic(
                replica, next(iter(examples.values())).head(EXAMPLES_CHECKED), name=f"Model {letter}"
            )
    endpoint_error = max(
        _compared_ends(replica_a, replica_b, states, e, alignment is not None) for e in examples.values()
    )

    def repaired(t: float) -> State:
        state = interpolate(states[0], states[2], t, check=False)
        return state if repair is None else repair(state)

    example = next(iter(examples.values()))
    with configs_kept(model_a, model_b):
        scorer = scorer_for(loss, model_a, example, bind(replica_a, read=lambda output: output))
        networks, evaluation = traced_or_plain(
            replica_a,
            replica_b,
            states,
            None if repair is None else repaired,
            not callable(used),
            low,
            states[2] is states[1] and endpoint_error == 0.0,
            example.head(EXAMPLES_CHECKED),
            scorer.read,
        )
        sweeps = {name: Sweep(name, items, scorer) for name, items in data.items()}
        _run(sweeps, networks, {*ts.tolist(), MIDPOINT})
        if adaptive:
            ts = _refined(sweeps, networks, tolerance, lipschitz)
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    settings = {
        "points": f"adaptive ({len(ts)})" if adaptive else len(ts),
        "loss": scorer.name,
        "refresh": "none" if used is None else _name(used),
        "alignment": "none" if alignment is None else getattr(alignment, "method", type(alignment).__name__),
        "bootstrap": bootstrap,
        "seed": generator.initial_seed(),
        "precision": precision or str(floating_dtype(states[0])).removeprefix("torch."),
        "evaluation": evaluation,
        "uncertainty": "smooth estimate" if lipschitz is None else f"bound for slope {lipschitz:g}",
    }
    curves = {
        name: curve_from(sweep.per_example(), ts, bootstrap, generator, lipschitz)
        for name, sweep in sweeps.items()
    }
    notes += scorer.notes
    notes += [note for note in (sweep.chance_note() for sweep in sweeps.values()) if note is not None]
    for note in notes:
        warnings.warn(note, IsthmusWarning, stacklevel=2)
    return Line(curves, endpoint_error, settings, tuple(notes), scorer.unit(example))


def _repair(
    refresh: Refresh, replica: Replica, data: dict[str, Batches], given: Batches | None
) -> tuple[Callable[[State], State] | None, Refresh, list[str]]:
    """Return what repairs an interior state, by which name, and what a reader should know of it.

    A data set that serves is made reusable in ``data``.
    """
    chosen = next(
        (name for name in ("train", *data) if name in data and not _is_test(name)), next(iter(data))
    )
    model = replica.source
    used = chosen_refresh(refresh, model, data[chosen])
    if used != "batchnorm":
        if given is not None and refresh != "auto":
            raise DataError('refresh_batches was given, but only refresh="batchnorm" uses it.')
        repair = refresher(used, replica, None)
        left = averaged_statistics(model, recomputed=False) if used is None else []
        return repair, used, [_left_note(left)] if left else []
    notes: list[str] = []
    if given is None:
        given = data[chosen] = reusable(data[chosen])
        if _is_test(chosen):
            notes.append(
                f"The running statistics of interior points were recomputed on {chosen!r}, data that the networks are "
                "also judged by. Give the training data as refresh_batches=..., or as a data set named 'train'."
            )
    left = averaged_statistics(model, recomputed=True)
    return refresher(refresh, replica, given), used, notes + ([_left_note(left)] if left else [])


def _left_note(layers: Sequence[str]) -> str:
    return (
        f"Running statistics inside the line ({some_layers(layers)}) are the average of the two ends', which "
        "is wrong there, so the losses and the barrier say little. Recompute them: "
        'refresh="batchnorm" (--refresh batchnorm) with training data, or a function for other layers than BatchNorm.'
    )


def _buffers_note(names: Sequence[str]) -> str:
    return (
        f"Buffers inside the line ({some_layers(names)}) are the average of the two ends'. Where the network computes "
        "them from its weights or its data (spectral normalisation, a norm of its own), that is wrong there, and the "
        "losses and the barrier say little. In Python, refresh= takes a function of a state that recomputes them."
    )


def _is_test(name: str) -> bool:
    """Tell whether a data set's name says that it is not for training."""
    return bool(_TEST_NAMES & set(re.split(r"[^a-z]+", name.lower())))


def _check_options(bootstrap: int, tolerance: float, lipschitz: float | None) -> None:
    if bootstrap < 0 or bootstrap == 1:
        raise DataError(f"Expected 0 or at least 2 bootstrap resamples, found {bootstrap}.")
    for name, value in (("tolerance", tolerance), ("lipschitz", lipschitz)):
        if value is not None and not (value > 0 and math.isfinite(value)):
            raise DataError(f"Measuring a line: expected {name} above 0, found {value}.")


def _low(precision: str | None, state: State) -> bool:
    """Tell whether products are lowered to bfloat16."""
    found = floating_dtype(state)
    if precision not in (None, "bfloat16") or (precision and found not in (torch.float32, torch.bfloat16)):
        raise DataError(
            f'Measuring a line: expected precision=None, or "bfloat16" for a float32 network; found {precision!r} '
            f"for a network in {found}."
        )
    return precision is not None and found == torch.float32


def _with_examples(data: Mapping[str, Batches]) -> tuple[dict[str, Batches], dict[str, Batch]]:
    """Return the data, and some first examples of each set; what is no list is iterated only once."""
    whole: dict[str, Batches] = {}
    examples: dict[str, Batch] = {}
    for name, items in data.items():
        rest = iter(items)
        first = list(islice(rest, 1))
        examples[name] = first_batch(first or items, name).head(ENDPOINT_EXAMPLES)
        whole[name] = items if isinstance(items, (list, tuple)) else chain(first, rest)
    return whole, examples


def _run(sweeps: Mapping[str, Sweep], networks: Networks, ts: set[float]) -> None:
    interior = sorted(t for t in ts if 0.0 < t < 1.0)
    for sweep in sweeps.values():
        sweep.run(networks, interior)


def _refined(
    sweeps: Mapping[str, Sweep], networks: Networks, tolerance: float, lipschitz: float | None
) -> Tensor:
    """Add positions where the loss may rise highest; return all of them."""
    while True:
        ts = torch.tensor(next(iter(sweeps.values())).positions, dtype=torch.float64)
        wanted: set[float] = set()
        for sweep in sweeps.values():
            wanted |= set(next_points(sweep.mean_losses(), ts, lipschitz, tolerance))
        if not wanted or len(ts) >= MOST_POINTS:
            return ts
        _run(sweeps, networks, set(sorted(wanted)[: MOST_POINTS - len(ts)]))


def _compared_ends(
    replica_a: Replica,
    replica_b: Replica | None,
    states: tuple[State, State, State],
    examples: Batch,
    aligned: bool,
) -> float:
    """Return how far the original B and the path's end differ, or raise if that is no rounding error."""
    _, state_b, end = states
    if end is state_b and replica_b is None:
        return 0.0
    original = bind(replica_a, state_b) if replica_b is None else bind(replica_b)
    reached = bind(replica_a, end)(examples)
    error = relative_difference(original(examples), reached)
    if error <= max(ENDPOINT_TOLERANCE, 16 * torch.finfo(reached.dtype).eps):
        return error
    if replica_b is None or (aligned and not differences(replica_a.source, replica_b.source)):
        raise VerificationError(
            f"The alignment changes the function of B: outputs differ by {error:.2g} of the largest one. "
            "A barrier measured with it would be wrong. Was the spec discovered on this architecture, and "
            "verified?"
        )
    how = f"outputs differ by {error:.2g} of the largest one"
    raise ModelError(different_code(replica_a.source, replica_b.source, how))


def _named(batches: Batches | Mapping[str, Batches]) -> dict[str, Batches]:
    """Return data sets by name, catching a batch passed where a list of batches belongs."""
    data = dict(batches) if isinstance(batches, Mapping) else {"data": batches}
    if not data:
        raise DataError("Measuring a line: expected at least one data set, found an empty mapping.")
    for name, items in data.items():
        if isinstance(items, (Tensor, Batch)) or not hasattr(items, "__iter__"):
            raise DataError(
                f"Measuring a line on {name!r}: expected an iterable of batches, found a "
                f"{type(items).__name__}. Put a single batch in a list: [(inputs, targets)]."
            )
    return data


def _checked_states(
    model_a: nn.Module, model_b: nn.Module | Mapping[str, Tensor], alignment: Relabelling | None
) -> tuple[State, State, State]:
    """Return the states of A, of B, and of the path's end."""
    if not isinstance(model_a, nn.Module):
        raise ModelError(
            f"Measuring a line: expected model_a to be a torch.nn.Module, found {type(model_a).__name__}. "
            "Only model_b may be a state: it is run in model_a's code."
        )
    require_evaluation(model_a, "Model A")
    if isinstance(model_b, nn.Module):
        require_evaluation(model_b, "Model B")
    state_a, state_b = state_of(model_a, "A"), state_of(model_b, "B")
    check_same_architecture(state_a, state_b)
    check_finite(state_a, "A")
    check_finite(state_b, "B")
    if alignment is None:
        return state_a, state_b, state_b
    end = state_of(alignment.apply(state_b), "aligned B")
    check_frame(alignment, state_a)
    check_same_architecture(state_a, end, "A", "aligned B")
    check_finite(end, "aligned B")
    return state_a, state_b, end


def _name(value: object) -> str:
    return value if isinstance(value, str) else getattr(value, "__name__", type(value).__name__)
