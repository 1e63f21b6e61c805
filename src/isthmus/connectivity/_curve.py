"""Results of measuring a path: one curve for each data set."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from isthmus.connectivity._adaptive import ceiling
from isthmus.connectivity._barrier import bootstrap_means, chord_of, loss_barrier
from isthmus.losses import Scores, mean_over_rows

__all__ = ["Curve", "Line", "PerExample", "curve_from"]

MIDPOINT = 0.5
_CLAUSE = 60
"""Characters of a reason that the table shows."""


@dataclass(frozen=True, eq=False)
class PerExample:
    """Scores and errors of every example at every position, from one pass over a data set.

    Attributes:
        positions: the grid, and 0.5 if it was not in it, rising.
        examples: number of examples.
        losses: float64 ``(positions, rows)``; a row is an example, or a batch (:class:`isthmus.losses.Scores`).
        weights: what each loss counts for, the same shape; None where all count alike.
        correct: share of right predictions, the same shape, or None.
        counts: what it counts for, or None as for weights.
        errors: norm of the error of linear connectivity, ``(positions, examples)``.
        error_weights: what it counts for, or None.
        ensemble: scores of the mean of the endpoints' outputs, or None where it has no loss.
    """

    positions: tuple[float, ...]
    examples: int
    losses: Tensor
    weights: Tensor | None
    correct: Tensor | None
    counts: Tensor | None
    errors: Tensor
    error_weights: Tensor | None
    ensemble: Scores | None


@dataclass(frozen=True, eq=False)
class Curve:
    r"""The line on one data set; tensors are float64 on the CPU, shape ``(points,)``.

    Attributes:
        examples: number of examples.
        ts: positions; ``t`` is the weight of B.
        loss: mean loss, in :attr:`Line.unit`; the ends are the original networks.
        loss_error: standard errors by bootstrap over examples; None where not computed.
        accuracy: share of right predictions; None for regression.
        accuracy_error: standard errors by bootstrap.
        chord: the straight line between the endpoints' losses.
        barrier: largest rise of the loss above the chord on the grid, 0 or more. Two points see none.
        barrier_at: the ``t`` that reaches it.
        barrier_error: standard error by bootstrap. A maximum of noisy values is biased upwards, so a
            barrier of one standard error is no barrier.
        barrier_uncertainty: how much higher than ``barrier`` the loss may rise between the points of the grid: an
            estimate for smooth curves (:mod:`isthmus.connectivity._adaptive`), or a bound if a Lipschitz constant
            was given; None with fewer than four points. It says nothing about the sample: that is
            ``barrier_error``.
        spacing: widest gap of the grid.
        midpoint_loss: loss at ``t = 0.5``, in the grid or not (what the authors' notebook calls "LMC error").
        midpoint_loss_error: its standard error.
        midpoint_accuracy: accuracy there.
        lmc_error: mean over data of :math:`\|f_t - [(1-t) f_A + t f_B]\|_2`, the error of linear mode
            connectivity of Ferbach et al. 2024 (arXiv:2310.19103); the norm is over the outputs of an
            example, or over the classes at each position and then averaged over positions.
        ensemble_loss: loss of the mean of the two networks' outputs; None where only a network can compute one.
        ensemble_accuracy: its accuracy.
    """

    examples: int
    ts: Tensor
    loss: Tensor
    loss_error: Tensor | None
    accuracy: Tensor | None
    accuracy_error: Tensor | None
    chord: Tensor
    barrier: float
    barrier_at: float
    barrier_error: float | None
    barrier_uncertainty: float | None
    spacing: float
    midpoint_loss: float
    midpoint_loss_error: float | None
    midpoint_accuracy: float | None
    lmc_error: Tensor
    ensemble_loss: float | None
    ensemble_accuracy: float | None

    def __repr__(self) -> str:
        """Return one line."""
        return f"Curve({self.examples} examples, {len(self.ts)} points, barrier {self.barrier:.4g})"

    @property
    def lmc_error_sup(self) -> float:
        """Largest LMC error on the grid."""
        return float(self.lmc_error.max())

    @property
    def endpoint_losses(self) -> tuple[float, float]:
        """Losses of the original A and B."""
        return float(self.loss[0]), float(self.loss[-1])

    @property
    def endpoint_accuracies(self) -> tuple[float, float] | None:
        """Accuracies of the original A and B."""
        return None if self.accuracy is None else (float(self.accuracy[0]), float(self.accuracy[-1]))

    def to_dict(self) -> dict[str, Any]:
        """Return numbers and lists only, fit for JSON."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        plain = {k: v.tolist() if isinstance(v, Tensor) else v for k, v in values.items()}
        return {
            **plain,
            "lmc_error_sup": self.lmc_error_sup,
            "endpoint_losses": list(self.endpoint_losses),
            "endpoint_accuracies": None if self.accuracy is None else self.accuracy[[0, -1]].tolist(),
        }


@dataclass(frozen=True, eq=False)
class Line:
    """A path between two networks, straight unless told otherwise, measured on one or more data sets.

    Attributes:
        curves: a :class:`Curve` for each data set, by name, in the order given. ``line.barrier`` and the
            other names of :class:`Curve` below speak of the first.
        endpoint_error: largest difference between the outputs of the original B and of the path's end at
            ``t = 1`` (B aligned, in A's code), relative to B's largest output in the batch.
        settings: how it was measured.
        notes: what makes the numbers easy to misread, such as endpoints near chance; each is a warning too.
        unit: of losses and barriers, such as ``"nats per example"``.
    """

    curves: Mapping[str, Curve]
    endpoint_error: float
    settings: Mapping[str, Any]
    notes: tuple[str, ...] = ()
    unit: str = "nats per example"

    @property
    def curve(self) -> Curve:
        """The curve on the first data set."""
        return next(iter(self.curves.values()))

    @property
    def ts(self) -> Tensor:
        """Positions, the same for all data sets."""
        return self.curve.ts

    @property
    def loss(self) -> Tensor:
        """Mean loss at each position."""
        return self.curve.loss

    @property
    def accuracy(self) -> Tensor | None:
        """Accuracy at each position."""
        return self.curve.accuracy

    @property
    def chord(self) -> Tensor:
        """Straight line between the endpoints' losses."""
        return self.curve.chord

    @property
    def barrier(self) -> float:
        """Largest rise above the chord."""
        return self.curve.barrier

    @property
    def barrier_at(self) -> float:
        """Where the barrier is reached."""
        return self.curve.barrier_at

    @property
    def barrier_error(self) -> float | None:
        """Standard error of the barrier."""
        return self.curve.barrier_error

    @property
    def barrier_uncertainty(self) -> float | None:
        """Height by which the loss may rise further between the points."""
        return self.curve.barrier_uncertainty

    @property
    def midpoint_loss(self) -> float:
        """Loss at ``t = 0.5``."""
        return self.curve.midpoint_loss

    @property
    def midpoint_accuracy(self) -> float | None:
        """Accuracy at ``t = 0.5``."""
        return self.curve.midpoint_accuracy

    @property
    def lmc_error(self) -> Tensor:
        """LMC error at each position."""
        return self.curve.lmc_error

    @property
    def lmc_error_sup(self) -> float:
        """Largest LMC error."""
        return self.curve.lmc_error_sup

    @property
    def ensemble_loss(self) -> float | None:
        """Loss of the mean of the outputs."""
        return self.curve.ensemble_loss

    @property
    def ensemble_accuracy(self) -> float | None:
        """Accuracy of the mean of the outputs."""
        return self.curve.ensemble_accuracy

    def to_dict(self) -> dict[str, Any]:
        """Return numbers, strings and lists only, fit for JSON."""
        return {
            "endpoint_error": self.endpoint_error,
            "settings": dict(self.settings),
            "unit": self.unit,
            "notes": list(self.notes),
            "curves": {name: curve.to_dict() for name, curve in self.curves.items()},
        }

    def __repr__(self) -> str:
        """Return one line: what was measured, and the barrier on every data set."""
        barriers = ", ".join(f"{name}: {curve.barrier:.4g}" for name, curve in self.curves.items())
        return f"Line({len(self.ts)} points, barrier {barriers} {self.unit})"

    def __str__(self) -> str:
        header = ("data", "examples", "A", "B", "midpoint", "ensemble", "barrier", "at t", "LMC error")
        rows: list[tuple[str, ...]] = [header]
        for name, curve in self.curves.items():
            error = "" if curve.barrier_error is None else f" ± {curve.barrier_error:.2g}"
            losses = [*curve.endpoint_losses, curve.midpoint_loss, curve.ensemble_loss]
            barrier = [f"{curve.barrier:.4g}{error}", f"{curve.barrier_at:.3g}", f"{curve.lmc_error_sup:.4g}"]
            shown = ("–" if value is None else f"{value:.4g}" for value in losses)
            rows.append((name, str(curve.examples), *shown, *barrier))
            if curve.endpoint_accuracies is not None:
                shares = [*curve.endpoint_accuracies, curve.midpoint_accuracy, curve.ensemble_accuracy]
                rows.append(("", "accuracy", *(f"{s:.2%}" for s in shares if s is not None), "", "", ""))
        widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
        padded = [[cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in rows]
        lines = ["  ".join(row).rstrip() for row in padded]
        shown = {**self.settings, "evaluation": _clause(str(self.settings.get("evaluation", "")))}
        settings = ", ".join(f"{key} {value}" for key, value in shown.items() if value != "")
        about = f"(losses in {self.unit}; {settings}; endpoint error {self.endpoint_error:.1e})"
        return "\n".join([*lines, about, *(f"Note: {note}" for note in self.notes)])


def _clause(text: str) -> str:
    """Return how points were run, a reason in brackets cut to its first clause (``settings`` has it in full)."""
    how, bracket, reason = text.partition(" (")
    if not bracket:
        return text
    first = re.split(r"[:;,.](?= |$)| \(", reason.removesuffix(")"), maxsplit=1)[0]
    return f"{how} ({first if len(first) <= _CLAUSE else first[: _CLAUSE - 1].rsplit(' ', 1)[0] + ' …'})"


def curve_from(
    measured: PerExample,
    ts: Tensor,
    replicates: int,
    generator: torch.Generator,
    lipschitz: float | None = None,
) -> Curve:
    """Average what was measured, with bootstrap standard errors where there are two examples or more."""
    on_grid = [measured.positions.index(t) for t in ts.tolist()]
    middle = measured.positions.index(MIDPOINT)
    losses = mean_over_rows(measured.losses, measured.weights)
    accuracies = None if measured.correct is None else mean_over_rows(measured.correct, measured.counts)
    ensemble = measured.ensemble
    errors = _standard_errors(measured, on_grid, ts, replicates, generator)
    loss = losses[on_grid]
    barrier = loss_barrier(loss, ts)
    above = ceiling(loss, ts, lipschitz)
    return Curve(
        examples=measured.examples,
        ts=ts,
        loss=loss,
        loss_error=None if errors is None else errors[0][on_grid],
        accuracy=None if accuracies is None else accuracies[on_grid],
        accuracy_error=None if errors is None or errors[1] is None else errors[1][on_grid],
        chord=chord_of(loss, ts),
        barrier=barrier.height,
        barrier_at=barrier.at,
        barrier_error=None if errors is None else errors[2],
        barrier_uncertainty=None if above is None else max(0.0, float(above.heights.max()) - barrier.height),
        spacing=barrier.spacing,
        midpoint_loss=float(losses[middle]),
        midpoint_loss_error=None if errors is None else float(errors[0][middle]),
        midpoint_accuracy=None if accuracies is None else float(accuracies[middle]),
        lmc_error=mean_over_rows(measured.errors, measured.error_weights)[on_grid],
        ensemble_loss=None if ensemble is None else ensemble.loss,
        ensemble_accuracy=None if ensemble is None else ensemble.accuracy,
    )


def _standard_errors(
    measured: PerExample, on_grid: list[int], ts: Tensor, replicates: int, generator: torch.Generator
) -> tuple[Tensor, Tensor | None, float] | None:
    """Return standard errors of losses, of accuracies, and of the barrier."""
    rows = measured.losses if measured.correct is None else torch.cat([measured.losses, measured.correct])
    weights = _row_weights(measured)
    if weights is not None:  # rows without a label that counts are no sample of anything
        counted = (weights > 0).any(0)
        rows, weights = rows[:, counted], weights[:, counted]
    count = len(measured.losses)
    if replicates == 0 or rows.shape[1] < 2:
        return None
    means = bootstrap_means(rows, replicates, generator, weights)
    loss_means = means[:, on_grid]
    barriers = (loss_means - chord_of(loss_means, ts)).amax(1)
    spread = means.std(0)
    return spread[:count], None if measured.correct is None else spread[count:], float(barriers.std())


def _row_weights(measured: PerExample) -> Tensor | None:
    """Return the weights of the losses, then those of the shares of right predictions; None where all are equal."""
    if measured.weights is None and measured.counts is None:
        return None
    columns = [(measured.losses, measured.weights)]
    if measured.correct is not None:
        columns.append((measured.correct, measured.counts))
    return torch.cat([torch.ones_like(values) if w is None else w for values, w in columns])
