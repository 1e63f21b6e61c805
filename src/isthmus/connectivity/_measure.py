"""One data set's share of a line: running all points on it and collecting values per example."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from isthmus.batches import Batches, iterate
from isthmus.connectivity._chance import TargetTally, chance_note
from isthmus.connectivity._curve import PerExample
from isthmus.connectivity._networks import Networks
from isthmus.evaluation import Loss, Scores, class_axis_last, require_finite, score

__all__ = ["Sweep"]

GROUP_BYTES = 2**25
ENDS_BYTES = 2**28


@dataclass
class _Row:
    """What is known at one position, or of the ensemble: a tensor for each piece of the data."""

    losses: list[Tensor] = field(default_factory=list[Tensor])
    correct: list[Tensor | None] = field(default_factory=list[Tensor | None])
    errors: list[Tensor] = field(default_factory=list[Tensor])

    def shares(self) -> Tensor | None:
        known = [c for c in self.correct if c is not None]
        return torch.cat(known) if len(known) == len(self.correct) else None


class Sweep:
    """Values per example at a growing set of positions of a line.

    Outputs are scored for many points together, in groups below 32 MiB. The outputs of the two ends are kept for later
    positions while they fit in 256 MiB.

    Args:
        name: of the data set, for messages.
        batches: the data; iterated once for each call of :meth:`run`.
        loss: see :func:`isthmus.evaluation.score`.
    """

    def __init__(self, name: str, batches: Batches, loss: Loss) -> None:
        self._name, self._batches, self._loss = name, batches, loss
        self._rows: dict[float, _Row] = {}
        self._ensemble = _Row()
        self._targets = TargetTally(loss)
        self._ends: list[tuple[Tensor, Tensor]] = []
        self._ends_bytes = 0

    @property
    def positions(self) -> tuple[float, ...]:
        """Positions measured so far, rising."""
        return tuple(sorted(self._rows))

    @torch.no_grad()
    def run(self, networks: Networks, ts: Sequence[float]) -> None:
        """Run the interior positions ``ts``, and the ends the first time."""
        networks.begin(ts)
        first = not self._rows
        for index, piece in enumerate(networks.pieces(iterate(self._batches, self._name))):
            kept = None if first or index >= len(self._ends) else self._ends[index]
            outputs = networks.outputs(piece, ends=kept is None)
            f_a, f_b = kept or self._both(outputs)
            if first:
                self._keep(f_a, f_b)
                self._targets.update(f_a, piece.targets)
                self._score([0.0, 1.0], [f_a, f_b], (f_a, f_b), piece.targets)
                ensemble = score(_chord(f_a, f_b, [0.5])[0], piece.targets, self._loss)
                self._ensemble.losses.append(ensemble.losses)
                self._ensemble.correct.append(ensemble.correct)
            self._score_groups(ts, outputs, (f_a, f_b), piece.targets)

    def per_example(self) -> PerExample:
        """Return all that was measured."""
        positions = sorted(self._rows)
        rows = [self._rows[t] for t in positions]
        correct = [share for share in (row.shares() for row in rows) if share is not None]
        return PerExample(
            positions=tuple(positions),
            losses=torch.stack([torch.cat(row.losses) for row in rows]),
            correct=torch.stack(correct) if len(correct) == len(rows) else None,
            errors=torch.stack([torch.cat(row.errors) for row in rows]),
            ensemble_losses=torch.cat(self._ensemble.losses),
            ensemble_correct=self._ensemble.shares(),
        )

    def chance_note(self) -> str | None:
        """Return what a reader should know of ends near chance (see :mod:`isthmus.connectivity._chance`)."""
        ends = [self._rows[0.0], self._rows[1.0]]
        losses = [torch.cat(row.losses) for row in ends]
        return chance_note(self._name, self._targets.constant(), losses, [row.shares() for row in ends])

    def mean_losses(self) -> Tensor:
        """Return the mean loss at each position, rising, float64."""
        return torch.stack([torch.cat(self._rows[t].losses).mean() for t in sorted(self._rows)])

    def _both(self, outputs: Iterator[Tensor]) -> tuple[Tensor, Tensor]:
        f_a = next(outputs)
        return f_a, next(outputs).to(f_a)

    def _keep(self, f_a: Tensor, f_b: Tensor) -> None:
        """Keep the outputs of the ends as long as all so far were kept and there is room."""
        self._ends_bytes += 2 * f_a.numel() * f_a.element_size()
        if self._ends_bytes <= ENDS_BYTES:
            self._ends.append((f_a, f_b))

    def _score_groups(
        self,
        ts: Sequence[float],
        outputs: Iterator[Tensor],
        ends: tuple[Tensor, Tensor],
        targets: Tensor | None,
    ) -> None:
        size = max(1, GROUP_BYTES // max(1, ends[0].numel() * ends[0].element_size()))
        for start in range(0, len(ts), size):
            group = ts[start : start + size]
            self._score(group, [next(outputs) for _ in group], ends, targets)

    def _score(
        self,
        ts: Sequence[float],
        outputs: list[Tensor],
        ends: tuple[Tensor, Tensor],
        targets: Tensor | None,
    ) -> None:
        """Score the outputs at several positions together."""
        stacked = torch.stack(outputs)
        examples = stacked.shape[1]
        repeated = None if targets is None else targets.repeat(len(ts), *[1] * (targets.ndim - 1))
        if callable(self._loss):
            scored = [score(f, targets, self._loss) for f in outputs]
            shares = [s.correct for s in scored if s.correct is not None]
            together = Scores(
                torch.cat([s.losses for s in scored]), torch.cat(shares) if len(shares) == len(ts) else None
            )
        else:
            together = score(stacked.flatten(0, 1), repeated, self._loss)
        chords = _chord(*ends, ts)
        errors = _error_norms((stacked.to(chords.dtype) - chords).flatten(0, 1), repeated, self._loss)
        for k, t in enumerate(ts):
            part = slice(k * examples, (k + 1) * examples)
            row = self._rows.setdefault(t, _Row())
            row.losses.append(together.losses[part])
            require_finite(row.losses[-1], f"The loss on {self._name!r} at t = {t:g}")
            row.correct.append(None if together.correct is None else together.correct[part])
            row.errors.append(errors[part])


def _chord(f_a: Tensor, f_b: Tensor, ts: Sequence[float]) -> Tensor:
    """Return ``(1 - t) f_A + t f_B`` for each ``t``, in at least float32; shape ``(points, ...)``."""
    wide = torch.promote_types(f_a.dtype, torch.float32)
    start, end = f_a.to(wide), f_b.to(wide)
    return torch.stack([torch.lerp(start, end, t) for t in ts])


def _error_norms(difference: Tensor, targets: Tensor | None, loss: Loss) -> Tensor:
    """Return the norm of the difference for each example, float64 ``(n,)``; a mean over positions if any."""
    by_class = None if loss == "mse" or targets is None else class_axis_last(difference, targets)
    if by_class is None:
        by_class = difference.reshape(len(difference), 1, -1)
    norms = torch.linalg.vector_norm(by_class, dim=-1, dtype=torch.float64)
    return norms.reshape(len(norms), -1).mean(1).cpu()
