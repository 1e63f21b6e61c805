r"""Certificates: a proven bound on the error of linear connectivity, and on the barrier, of a concrete pair."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from isthmus.batches import Batches, iterate, reusable
from isthmus.certificates._measure import Measured, measure
from isthmus.certificates._path import NetworksBetween
from isthmus.errors import DataError
from isthmus.evaluation import require_evaluation
from isthmus.states import check_finite, check_same_architecture, state_of

__all__ = ["Certificate", "Envelope", "certify"]

_ROUNDING = 1e-9

_MOST_SEGMENTS = 4096
"""Segments beyond which no more are cut for a target."""

_MOST_HALVINGS = 3
"""Halvings of a segment in one pass: the errors that tell how many are needed are known at its ends only."""


@dataclass(frozen=True, eq=False)
class Envelope:
    """The certified region over the path; float64.

    Attributes:
        ts: ends of the segments, shape ``(segments + 1,)``; ``t`` is the weight of B.
        error: measured mean LMC error at the ends, in units of the outputs.
        error_bound: proven bound on it over each segment, shape ``(segments,)``.
        rise: measured loss minus chord at the ends, in units of the loss; ``None`` without targets.
        rise_bound: proven bound on it over each segment.
        chord: the chord of the loss at the ends.
    """

    ts: Tensor
    error: Tensor
    error_bound: Tensor
    rise: Tensor | None
    rise_bound: Tensor | None
    chord: Tensor | None


@dataclass(frozen=True, eq=False)
class Certificate:
    r"""Proven bounds for two networks and a data set.

    Attributes:
        lmc_error: bound on :math:`\sup_t \mathbb E_x \|f_t - [(1-t) f_A + t f_B]\|_2`.
        lmc_error_measured: largest value seen at the ends of segments; the truth lies between the two.
        per_example: bound on :math:`\sup_t` of the error of each example, shape ``(examples,)``.
        barrier: bound on the loss barrier; ``None`` without targets.
        barrier_measured: largest rise seen at the ends of segments.
        accuracy_floor: accuracy that every network of the path reaches at least: the smallest, over segments, share
            of examples that all networks of the segment classify correctly. ``None`` without class labels.
        envelope: the bounds along the path.
        examples: number of examples.
        segments: number of segments.
        scope: what exactly was certified.
    """

    lmc_error: float
    lmc_error_measured: float
    per_example: Tensor
    barrier: float | None
    barrier_measured: float | None
    accuracy_floor: float | None
    envelope: Envelope
    examples: int
    segments: int
    scope: str

    @property
    def lmc_error_rms(self) -> float:
        r"""Bound on :math:`\sup_t` of the root mean square over examples, from the bounds of each."""
        return float(self.per_example.square().mean().sqrt())

    @property
    def ratio(self) -> float:
        """How loose the bound on the LMC error can be: bound over largest measured value, 1 or more."""
        if self.lmc_error_measured == 0:
            return 1.0 if self.lmc_error <= 2 * _ROUNDING else math.inf
        return self.lmc_error / self.lmc_error_measured

    def to_dict(self) -> dict[str, Any]:
        """Return numbers, strings and lists only, fit for JSON (without the bounds per example)."""

        def plain(value: Any) -> Any:
            return value.tolist() if isinstance(value, Tensor) else value

        kept = {k: v for k, v in vars(self).items() if k not in ("per_example", "envelope")}
        largest = float(self.per_example.max())
        envelope = {k: plain(v) for k, v in vars(self.envelope).items()}
        # with one segment nothing is measured inside, and the ratio is infinite
        ratio = self.ratio if math.isfinite(self.ratio) else None
        summary = {"ratio": ratio, "lmc_error_rms": self.lmc_error_rms, "per_example_max": largest}
        return {**kept, **summary, "envelope": envelope}

    def __str__(self) -> str:
        """Return a short account."""
        lines = [
            f"LMC error: proven at most {self.lmc_error:.6g}, at least {self.lmc_error_measured:.6g} "
            f"(ratio {self.ratio:.3f}) over {self.examples} examples, {self.segments} segments"
        ]
        if self.barrier is not None and self.barrier_measured is not None:
            lines.append(f"barrier: proven at most {self.barrier:.6g}, at least {self.barrier_measured:.6g}")
        if self.accuracy_floor is not None:
            lines.append(f"accuracy on the whole path: proven at least {self.accuracy_floor:.4f}")
        return "\n".join([*lines, self.scope])


def certify(
    model_a: nn.Module,
    model_b: nn.Module | Mapping[str, Tensor],
    batches: Batches,
    *,
    segments: int = 16,
    loss: str = "cross_entropy",
    target: float | None = None,
) -> Certificate:
    r"""Prove how far the straight line between two networks can be from linear, and how high its barrier.

    [O] Theory, sections 3.5 and 3.6. The path is cut into segments. On each, the error of every node is propagated
    through the network (see :mod:`isthmus.certificates._propagate`) into :math:`R_k(x)`, and

    .. math:: \sup_t \mathbb E\|e(t)\| \le \max_k \bigl[\max(\mathbb E\|\delta_k\|, \mathbb E\|\delta_{k+1}\|)
              + \mathbb E R_k\bigr]

    with :math:`\delta_k` the exact error at the ends. Cross-entropy rises over its chord by at most
    :math:`\mathbb E \min\{\sqrt2 R,\; \sqrt2 (1 - e^{-c}) R + R^2/4\}` more, with :math:`c` the larger loss of the two
    ends; squared error by the expansion of the square. No randomness, no assumption on the weights.

    Args:
        model_a: network A, in evaluation mode; not mutated.
        model_b: network B or its state, **already relabelled** (``alignment.apply(b)``). Of a module, the code is run
            once, in evaluation mode, to see that it computes what A's code computes with B's tensors.
        batches: the data over which the statement is made; with targets for a bound on the barrier.
        segments: number of equal segments. The bound tightens like ``segments^-1.5`` or faster; 16 usually come
            within a few per cent for multi-layer perceptrons, 64 for deep convolutional networks.
        loss: ``"cross_entropy"`` or ``"mse"``.
        target: ratio of the bound on the LMC error to the largest measured value, above 1. Segments whose bound is
            above it are cut into 2, 4 or 8, pass after pass over the data (which are then kept in memory), until none
            is, or until there are 4096 segments: see :attr:`Certificate.ratio` for what was reached.
            It is about the error: where the error is small its segments stay long, and the bound on the barrier loose.

    Returns:
        The certificate. Numbers are float64 and proven, rounding included: what float64 may have done to the values
        of the networks is bounded and added, and ``1e-9 (1 + value)`` for the arithmetic of the bound itself.

    Raises:
        ModelError: an operator is out of scope (the message names it), training mode, not traceable, B's code computes
            something else, or outputs that are not finite.
        DataError: no data, an unknown loss, fewer than one segment, or a target of 1 or less.
        CheckpointError: different architectures, NaN or infinite weights, integers read by the network in which A and
            B differ, tied tensors that differ.

    Notes:
        ``segments + 1`` forward passes of the data with stored activations, one batch at a time, and at most 17
        spectral norms of every layer: a norm is convex along the path, so chords between 17 values bound it. With
        batch normalisation the certified path is that of the folded networks (each normalisation multiplied into
        the layer before it), which has the same ends.
    """
    _check_settings(segments, loss, target)
    require_evaluation(model_a, "Network A")
    a, b = state_of(model_a, "A"), state_of(model_b, "B")
    check_same_architecture(a, b)
    check_finite(a, "A")
    check_finite(b, "B")
    knots = segments + 1 if target is None else _MOST_SEGMENTS
    path = NetworksBetween(model_a, model_b if isinstance(model_b, nn.Module) else None, a, b, knots=knots)
    ts = [k / segments for k in range(segments + 1)]
    data = iterate(reusable(batches)) if target is None else list(iterate(reusable(batches)))
    parts = [measure(path, batch, list(itertools.pairwise(ts)), loss) for batch in data]
    while target is not None and (finer := _finer(parts, ts, target)):
        parts = [measure(path, batch, finer, loss, known) for batch, known in zip(data, parts, strict=True)]
        ts = sorted({*ts, *(t for span in finer for t in span)})
    return _assemble(parts, ts, loss, folded=path.folded)


def _check_settings(segments: int, loss: str, target: float | None) -> None:
    if loss not in ("cross_entropy", "mse"):
        raise DataError(f"certify: unknown loss {loss!r}; bounds are known for 'cross_entropy' and 'mse'.")
    if segments < 1 or segments != int(segments):
        raise DataError(f"certify: segments must be a whole number, at least 1, found {segments}.")
    if target is not None and not target > 1:
        raise DataError(
            f"certify: a target is a ratio of bound to measured value and must be above 1, found {target}."
        )


def _finer(parts: Sequence[Measured], ts: Sequence[float], target: float) -> list[tuple[float, float]]:
    """Return, rising, the parts of the segments above the target; the loosest come first if there are too many.

    A segment's own bound falls like the square of its length, or a little slower: that tells how many parts it needs.
    """
    error, error_bound, _ = _errors(parts, ts)
    ends = torch.maximum(error[:-1], error[1:])
    goal = max(target * float(error.max()), 4 * _ROUNDING)
    shrink = ((error_bound - ends) / (goal - ends).clamp_min(_ROUNDING)).clamp_min(1)
    powers = (shrink.log2() / 2).round().clamp(1, _MOST_HALVINGS).long().tolist()
    left = _MOST_SEGMENTS - len(ends)
    found: list[tuple[float, float]] = []
    for k in torch.argsort(error_bound, descending=True).tolist():
        count = 2 ** powers[k]
        if float(error_bound[k]) <= goal or left < count - 1:
            break
        left -= count - 1
        cuts = [ts[k] + (ts[k + 1] - ts[k]) * i / count for i in range(count)]
        found += itertools.pairwise([*cuts, ts[k + 1]])
    return sorted(found)


def _errors(parts: Sequence[Measured], ts: Sequence[float]) -> tuple[Tensor, Tensor, Tensor]:
    """Return mean errors at the points, bounds on the mean between them, and bounds for every example."""
    spans = list(itertools.pairwise(ts))
    errors = torch.cat([torch.stack([p.points[t].error for t in ts]) for p in parts], 1)
    bounds = torch.cat([torch.stack([p.spans[s].bound for s in spans]) for p in parts], 1)
    rounding = torch.cat([p.rounding for p in parts])
    mean = errors.mean(1)
    each = (torch.maximum(errors[:-1], errors[1:]) + bounds).max(0).values + rounding
    return (
        mean,
        _rounded(torch.maximum(mean[:-1], mean[1:]) + bounds.mean(1) + rounding.mean()),
        _rounded(each),
    )


def _rises(parts: Sequence[Measured], ts: Sequence[float]) -> tuple[Tensor, Tensor, Tensor] | None:
    """Return the rise of the loss over its chord at the points, bounds between them, and the chord."""
    spans = list(itertools.pairwise(ts))
    losses, extra, slack = [], [], []
    for p in parts:
        found = [p.points[t].losses for t in ts]
        more = [p.spans[s].extra for s in spans]
        if p.loss_rounding is None or any(x is None for x in (*found, *more)):
            return None
        losses.append(torch.stack([x for x in found if x is not None]))
        extra.append(torch.stack([x for x in more if x is not None]))
        slack.append(p.loss_rounding)
    mean, at = torch.cat(losses, 1).mean(1), torch.tensor(ts, dtype=torch.float64, device=losses[0].device)
    chord = (1 - at) * mean[0] + at * mean[-1]
    rise = mean - chord
    above = torch.maximum(rise[:-1], rise[1:]) + torch.cat(extra, 1).mean(1) + torch.cat(slack).mean()
    return rise, _rounded(above), chord


def _floor(parts: Sequence[Measured], ts: Sequence[float]) -> float | None:
    """Return the accuracy that every network of the path reaches."""
    rows = [[p.spans[s].certain for s in itertools.pairwise(ts)] for p in parts]
    if any(x is None for row in rows for x in row):
        return None
    certain = torch.cat([torch.stack([x for x in row if x is not None]) for row in rows], 1)
    return float(certain.double().mean(1).min())


def _assemble(parts: Sequence[Measured], ts: Sequence[float], loss: str, *, folded: bool) -> Certificate:
    error, error_bound, each = (x.cpu() for x in _errors(parts, ts))
    rises = _rises(parts, ts)
    rise, rise_bound, chord = (None, None, None) if rises is None else (x.cpu() for x in rises)
    how = "with batch normalisation folded into the layers, " if folded else ""
    scope = (
        f"Proven for these two networks and these {len(each)} examples, on the straight line between their "
        f"tensors, {how}rounding in float64 included; loss {loss}. Nothing is claimed about other data."
    )
    return Certificate(
        lmc_error=float(error_bound.max()),
        lmc_error_measured=float(error.max()),
        per_example=each,
        barrier=None if rise_bound is None else max(float(rise_bound.max()), 0.0),
        barrier_measured=None if rise is None else max(float(rise.max()), 0.0),
        accuracy_floor=None if rises is None else _floor(parts, ts),
        envelope=Envelope(torch.tensor(ts, dtype=torch.float64), error, error_bound, rise, rise_bound, chord),
        examples=len(each),
        segments=len(ts) - 1,
        scope=scope,
    )


def _rounded(values: Tensor) -> Tensor:
    """Add the allowance of the bound's own arithmetic; what left the range of float64 on the way bounds nothing."""
    return torch.nan_to_num(values + _ROUNDING * (1 + values.abs()), nan=math.inf, posinf=math.inf)
