r"""Certificates: a proven bound on the error of linear connectivity, and on the barrier, of a concrete pair."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from isthmus.batches import Batch, Batches, device_of, iterate, reusable
from isthmus.errors import DataError, ModelError
from isthmus.evaluation import combine_states, require_evaluation, score
from isthmus.states import check_finite, check_same_architecture, state_of
from isthmus.symmetry import Trace, trace
from isthmus.theory._fold import fold_normalisation
from isthmus.theory._propagate import Ends, layer_norms, segment_bound

__all__ = ["Certificate", "Envelope", "certify"]

_ROUNDING = 1e-9

_KNOTS = 17
"""Points of the path at which spectral norms are computed; between them convexity bounds them."""


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
        accuracy_floor: share of examples that every network of the path classifies correctly, or less; the
            smallest over segments. ``None`` without class labels.
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
        return {**kept, "ratio": ratio, "per_example_max": largest, "envelope": envelope}

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
) -> Certificate:
    r"""Prove how far the straight line between two networks can be from linear, and how high its barrier.

    [O] theory note 3.5 and 3.6. The path is cut into segments. On each, the error of every node is propagated
    through the network (see :mod:`isthmus.theory._propagate`) into :math:`R_k(x)`, and

    .. math:: \sup_t \mathbb E\|e(t)\| \le \max_k \bigl[\max(\mathbb E\|\delta_k\|, \mathbb E\|\delta_{k+1}\|)
              + \mathbb E R_k\bigr]

    with :math:`\delta_k` the exact error at the ends. Cross-entropy rises over its chord by at most
    :math:`\mathbb E \min\{\sqrt2 R,\; \sqrt2 (1 - e^{-c}) R + R^2/4\}` more, with :math:`c` the larger loss of the two
    ends; squared error by the expansion of the square. No randomness, no assumption on the weights.

    Args:
        model_a: network A, in evaluation mode; not mutated.
        model_b: network B or its state, **already relabelled** (``alignment.apply(b)``).
        batches: the data over which the statement is made; with targets for a bound on the barrier.
        segments: number of equal segments. The bound tightens like ``segments^-1.5`` or faster; 16 usually come
            within a few per cent for multi-layer perceptrons, 64 for deep convolutional networks.
        loss: ``"cross_entropy"`` or ``"mse"``.

    Returns:
        The certificate. Numbers are float64 and proven up to rounding, for which ``1e-9 (1 + value)`` is added.

    Raises:
        ModelError: an operator is out of scope (the message names it), training mode, or not traceable.
        DataError: no data, or an unknown loss.
        CheckpointError: different architectures, NaN or infinite weights.

    Notes:
        ``segments + 1`` forward passes of the data with stored activations, one batch at a time, and at most 17
        spectral norms of every layer: a norm is convex along the path, so chords between 17 values bound it. With
        batch normalisation the certified path is that of the folded networks (each normalisation multiplied into
        the layer before it), which has the same ends.
    """
    if loss not in ("cross_entropy", "mse"):
        raise DataError(f"certify: unknown loss {loss!r}; bounds are known for 'cross_entropy' and 'mse'.")
    if segments < 1:
        raise DataError(f"certify: segments must be at least 1, found {segments}.")
    require_evaluation(model_a, "Network A")
    a, b = state_of(model_a, "A"), state_of(model_b, "B")
    check_same_architecture(a, b)
    check_finite(a, "A")
    check_finite(b, "B")
    path = _Path(model_a, a, b, segments)
    parts = [_certify_batch(path, batch, loss) for batch in iterate(reusable(batches))]
    return _assemble(path, parts, loss)


class _Path:
    """The folded networks at the ends of all segments, with the norms of their layers."""

    def __init__(
        self, model: nn.Module, state_a: Mapping[str, Tensor], state_b: Mapping[str, Tensor], segments: int
    ) -> None:
        self.model = copy.deepcopy(model).double()
        self.ts = [k / segments for k in range(segments + 1)]
        self._ends = (_double(state_a), _double(state_b))
        self._traces: dict[tuple[Any, ...], Trace] = {}
        self._folded_ends: tuple[dict[str, Tensor], ...] = ()
        self._norms: list[dict[str, float]] = []
        self.folded = False

    def traced(self, batch: Batch) -> Trace:
        key = tuple(
            tuple(t.shape) if isinstance(t, Tensor) else t for t in (*batch.args, *batch.kwargs.values())
        )
        if key not in self._traces:
            self._traces[key] = trace(self.model, batch.args, batch.kwargs)
            self._prepare(self._traces[key])
        return self._traces[key]

    def _prepare(self, traced: Trace) -> None:
        """Fold the states and bound the norms, once (they depend on no data).

        A norm is a convex function of the weights, hence of ``t``: chords between a few exact values lie above
        it, and their larger end over a segment bounds it there.
        """
        if self._folded_ends:
            return
        a, b = (fold_normalisation(traced, s) for s in self._ends)
        self._folded_ends = (a, b)
        self.folded = any(not torch.equal(a[k], self._ends[0][k]) for k in a)
        knots = np.linspace(0.0, 1.0, min(len(self.ts), _KNOTS))
        exact = [layer_norms(traced, self.state(t)) for t in knots.tolist()]
        chords = {name: np.interp(self.ts, knots, [norms[name] for norms in exact]) for name in exact[0]}
        self._norms = [{name: float(c[k]) for name, c in chords.items()} for k in range(len(self.ts))]

    def state(self, t: float) -> dict[str, Tensor]:
        """Return the state at a position; made anew, since keeping all of them takes memory and saves nothing."""
        return combine_states(self._folded_ends, lambda pair: _mix(pair, t), check=False)

    def end(self, k: int, traced: Trace, batch: Batch) -> tuple[Ends, Tensor]:
        """Return the values of all nodes at the end of a segment, and the output."""
        values: dict[str, Any] = dict(zip(traced.inputs, (*batch.args, *batch.kwargs.values()), strict=False))

        def keep(node: fx.Node, _: Any, result: Any) -> None:
            values[node.name] = result

        state = self.state(self.ts[k])
        traced.run(state, batch.args, batch.kwargs, on_node=keep)
        return Ends(state, values, self._norms[k]), values[self.output(traced).name]

    def output(self, traced: Trace) -> fx.Node:
        names = list(traced.outputs)
        chosen = "logits" if "logits" in names else names[0]
        return traced.outputs[chosen]


def _mix(pair: Sequence[Tensor], t: float) -> Tensor:
    return pair[0] if t == 0 else pair[1] if t == 1 else (1 - t) * pair[0] + t * pair[1]


def _double(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {k: v.double() if v.is_floating_point() else v for k, v in state.items()}


@dataclass(frozen=True, eq=False)
class _Part:
    """Per-example numbers of one batch: rows are ends or segments."""

    deltas: Tensor
    bounds: Tensor
    losses: Tensor | None
    extra: Tensor | None
    certain: Tensor | None


def _certify_batch(path: _Path, batch: Batch, loss: str) -> _Part:
    batch = batch.to(device_of(path.model), torch.float64)
    if batch.kwargs and len(batch.args) == 0 and len(batch.kwargs) > 1:
        raise ModelError(
            "certify: several inputs are out of scope; wrap the model so that it takes one tensor."
        )
    traced = path.traced(batch)
    deltas, bounds, outputs = [], [], []
    previous: Ends | None = None
    for k in range(len(path.ts)):
        here, output = path.end(k, traced, batch)
        outputs.append(output.reshape(output.shape[0], -1) if batch.targets is None else output)
        if previous is not None:
            bounds.append(segment_bound(traced, previous, here, path.output(traced)))
        previous = here
    first, last = outputs[0], outputs[-1]
    for t, output in zip(path.ts, outputs, strict=True):
        error = output - ((1 - t) * first + t * last)
        deltas.append(error.reshape(len(error), -1).norm(dim=1))
    radius = torch.stack(bounds)
    if batch.targets is None:
        return _Part(torch.stack(deltas), radius, None, None, None)
    scored = [score(o, batch.targets, loss) for o in outputs]
    losses = torch.stack([s.losses for s in scored])
    extra = torch.stack(list(_extra(outputs, losses, radius, batch.targets, loss)))
    certain = _certain(outputs, radius, batch.targets) if scored[0].correct is not None else None
    return _Part(torch.stack(deltas), radius, losses, extra, certain)


def _extra(
    outputs: Sequence[Tensor], losses: Tensor, radius: Tensor, targets: Tensor, loss: str
) -> Iterator[Tensor]:
    """Yield, per segment, how much more than the chord between its ends each example's loss can be."""
    for k, r in enumerate(radius):
        if loss == "cross_entropy":
            worst = torch.maximum(losses[k], losses[k + 1])
            if outputs[k].ndim > 2:
                yield math.sqrt(2) * r  # positions are averaged, and a mean of norms is at most the norm
            else:
                yield torch.minimum(
                    math.sqrt(2) * r, math.sqrt(2) * (1 - torch.exp(-worst)) * r + r.square() / 4
                )
            continue
        count = outputs[k][0].numel()
        distances = [
            (o - targets.to(o).reshape(o.shape)).reshape(len(o), -1).norm(dim=1) for o in outputs[k : k + 2]
        ]
        yield (2 * torch.maximum(*distances) * r + r.square()) / count


def _certain(outputs: Sequence[Tensor], radius: Tensor, targets: Tensor) -> Tensor | None:
    """Return, per segment and example, whether every network on the segment must classify it correctly.

    [O] theory note 3.6: the prediction cannot change where every margin of the chord exceeds ``√2 r``.
    """
    if outputs[0].ndim != 2:
        return None
    margins = []
    for output in outputs:
        chosen = output.gather(1, targets.long().unsqueeze(1))
        others = (chosen - output).scatter(1, targets.long().unsqueeze(1), math.inf)
        margins.append(others)
    ends = zip(margins[:-1], margins[1:], radius, strict=True)
    return torch.stack([torch.minimum(m, n).min(dim=1).values > math.sqrt(2) * r for m, n, r in ends])


def _assemble(path: _Path, parts: Sequence[_Part], loss: str) -> Certificate:
    deltas, bounds = torch.cat([p.deltas for p in parts], 1), torch.cat([p.bounds for p in parts], 1)
    error, reach = deltas.mean(1), bounds.mean(1)
    error_bound = _rounded(torch.maximum(error[:-1], error[1:]) + reach)
    each = _rounded((torch.maximum(deltas[:-1], deltas[1:]) + bounds).max(0).values)
    ts = torch.tensor(path.ts, dtype=torch.float64)
    rise = rise_bound = chord = None
    floor: float | None = None
    if all(p.losses is not None for p in parts):
        losses = torch.cat([p.losses for p in parts if p.losses is not None], 1).mean(1)
        extra = torch.cat([p.extra for p in parts if p.extra is not None], 1).mean(1)
        chord = (1 - ts) * losses[0] + ts * losses[-1]
        rise = losses - chord
        rise_bound = _rounded(torch.maximum(rise[:-1], rise[1:]) + extra)
        if all(p.certain is not None for p in parts):
            certain = torch.cat([p.certain for p in parts if p.certain is not None], 1)
            floor = float(certain.double().mean(1).min())
    how = "with batch normalisation folded into the layers, " if path.folded else ""
    scope = (
        f"Proven for these two networks and these {deltas.shape[1]} examples, on the straight line between their "
        f"tensors, {how}in float64 up to rounding; loss {loss}. Nothing is claimed about other data."
    )
    return Certificate(
        lmc_error=float(error_bound.max()),
        lmc_error_measured=float(error.max()),
        per_example=each,
        barrier=None if rise_bound is None else max(float(rise_bound.max()), 0.0),
        barrier_measured=None if rise is None else max(float(rise.max()), 0.0),
        accuracy_floor=floor,
        envelope=Envelope(ts, error, error_bound, rise, rise_bound, chord),
        examples=deltas.shape[1],
        segments=len(path.ts) - 1,
        scope=scope,
    )


def _rounded(values: Tensor) -> Tensor:
    return values + _ROUNDING * (1 + values.abs())
