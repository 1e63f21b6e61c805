"""One data set's share of a line: running all points on it and collecting scores of its rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from isthmus.batches import Batch, Batches, iterate
from isthmus.connectivity._chance import TargetTally, chance_note
from isthmus.connectivity._curve import PerExample
from isthmus.connectivity._networks import Networks
from isthmus.evaluation import require_counted, require_finite
from isthmus.losses import Scorer, Scores, averaged, mean_over_rows, unless_equal

__all__ = ["ScoredPositions"]

GROUP_BYTES = 2**25
ENDS_BYTES = 2**28


@dataclass
class _PositionScores:
    """Scores at one position for each piece of the data, errors and the weights of these."""

    scores: list[Scores] = field(default_factory=list[Scores])
    errors: list[Tensor] = field(default_factory=list[Tensor])
    error_weights: list[Tensor] = field(default_factory=list[Tensor])

    def mean_loss(self) -> Tensor:
        found = Scores.cat(self.scores)
        return mean_over_rows(found.losses, unless_equal(found.weights))


class ScoredPositions:
    """Scores at a growing set of positions of a line.

    Where a loss is that of each example by itself, outputs are scored for many points together, in groups below 32 MiB,
    and batches may be regrouped. Any other loss gets the batches as they come, one point after another. The outputs of
    the two ends are kept for later positions while they fit in 256 MiB.

    Args:
        name: of the data set, for messages.
        batches: the data; iterated once for each call of :meth:`run`.
        scorer: how outputs are scored.
    """

    def __init__(self, name: str, batches: Batches, scorer: Scorer) -> None:
        self._name, self._batches, self._scorer = name, batches, scorer
        self._rows: dict[float, _PositionScores] = {}
        self._ensemble: list[Scores] | None = []
        self._targets = TargetTally(scorer.kind)
        self._examples, self._reads_values = 0, False
        self._ends: list[tuple[Any, Any]] = []
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
        prepared = (self._scorer.prepare(batch) for batch in iterate(self._batches, self._name))
        for index, piece in enumerate(networks.pieces(prepared, whole=not self._scorer.by_example)):
            kept = None if first or index >= len(self._ends) else self._ends[index]
            outputs = networks.outputs(piece, ends=kept is None)
            ends = kept or self._both(outputs)
            if first:
                self._examples += piece.size
                self._reads_values |= any(t.is_floating_point() for t in _inputs(piece))
                self._keep(ends)
                self._targets.update(*self._scorer.judged(ends[0], piece))
                self._score([0.0, 1.0], list(ends), ends, piece)
                self._score_ensemble(ends, piece)
            self._score_groups(ts, outputs, ends, piece)

    def per_example(self) -> PerExample:
        """Return the scores and errors of every example.

        Raises:
            DataError: no label counts.
        """
        positions = sorted(self._rows)
        rows = [self._rows[t] for t in positions]
        scores = [Scores.cat(row.scores) for row in rows]
        require_counted(scores[0], f"The loss on {self._name!r}")
        return PerExample(
            positions=tuple(positions),
            examples=self._examples,
            losses=torch.stack([s.losses for s in scores]),
            weights=unless_equal(torch.stack([s.weights for s in scores])),
            correct=_stacked([s.correct for s in scores]),
            counts=_unless_equal_or_none(_stacked([s.counts for s in scores])),
            errors=torch.stack([torch.cat(row.errors) for row in rows]),
            error_weights=unless_equal(torch.stack([torch.cat(row.error_weights) for row in rows])),
            ensemble=None if self._ensemble is None else Scores.cat(self._ensemble),
        )

    def chance_note(self) -> str | None:
        """Return a note on ends near chance, or None (see :mod:`isthmus.connectivity._chance`)."""
        ends = [Scores.cat(self._rows[t].scores) for t in (0.0, 1.0)]
        return chance_note(self._name, self._targets.constant(), ends, tokens=not self._reads_values)

    def mean_losses(self) -> Tensor:
        """Return the mean loss at each position, rising, float64."""
        return torch.stack([self._rows[t].mean_loss() for t in sorted(self._rows)])

    def _both(self, outputs: Iterator[Any]) -> tuple[Any, Any]:
        f_a, f_b = next(outputs), next(outputs)
        like = self._scorer.tensor(f_a)

        def move(value: Any) -> Any:
            return value.to(like.device) if isinstance(value, Tensor) else value

        return f_a, f_b.to(f_a) if isinstance(f_b, Tensor) else pytree.tree_map(move, f_b)

    def _keep(self, ends: tuple[Any, Any]) -> None:
        """Keep the outputs of the ends as long as all so far were kept and there is room."""
        self._ends_bytes += _bytes(ends)
        if self._ends_bytes <= ENDS_BYTES:
            self._ends.append(ends)

    def _score_ensemble(self, ends: tuple[Any, Any], piece: Batch) -> None:
        middle = self._scorer.mean(*ends)
        if middle is None or self._ensemble is None:
            self._ensemble = None
        else:
            self._ensemble.append(self._scorer.score(middle, piece))

    def _score_groups(
        self, ts: Sequence[float], outputs: Iterator[Any], ends: tuple[Any, Any], piece: Batch
    ) -> None:
        size = max(1, GROUP_BYTES // max(1, _bytes(ends[0]))) if self._scorer.by_example else 1
        for start in range(0, len(ts), size):
            group = ts[start : start + size]
            self._score(group, [next(outputs) for _ in group], ends, piece)

    def _score(self, ts: Sequence[float], kept: list[Any], ends: tuple[Any, Any], piece: Batch) -> None:
        """Score the outputs at several positions, together if the loss allows it."""
        if not self._scorer.by_example:
            for t, one in zip(ts, kept, strict=True):
                self._add([t], self._scorer.score(one, piece), [one], ends, piece)
            return
        stacked = torch.stack(kept)
        repeated = _repeated(piece, len(ts))
        self._add(ts, self._scorer.score(stacked.flatten(0, 1), repeated), kept, ends, repeated)

    def _add(
        self, ts: Sequence[float], scores: Scores, kept: list[Any], ends: tuple[Any, Any], batch: Batch
    ) -> None:
        """Take the scores of several positions, and the errors of what was kept there."""
        outputs = torch.stack([self._scorer.tensor(one) for one in kept])
        chords = _chord(self._scorer.tensor(ends[0]), self._scorer.tensor(ends[1]), ts)
        difference = (outputs.to(chords.dtype) - chords).flatten(0, 1)
        vectors, counted = self._scorer.vectors(difference, batch)
        errors, weights = averaged(torch.linalg.vector_norm(vectors, dim=-1, dtype=torch.float64), counted)
        rows, examples = len(scores.losses) // len(ts), len(errors) // len(ts)
        for k, t in enumerate(ts):
            row = self._rows.setdefault(t, _PositionScores())
            row.scores.append(scores.part(k * rows, (k + 1) * rows))
            require_finite(row.scores[-1].losses, f"The loss on {self._name!r} at t = {t:g}")
            row.errors.append(errors[k * examples : (k + 1) * examples])
            row.error_weights.append(weights[k * examples : (k + 1) * examples])


def _chord(f_a: Tensor, f_b: Tensor, ts: Sequence[float]) -> Tensor:
    """Return ``(1 - t) f_A + t f_B`` for each ``t``, in at least float32; shape ``(points, ...)``."""
    wide = torch.promote_types(f_a.dtype, torch.float32)
    start, end = f_a.to(wide), f_b.to(wide)
    return torch.stack([torch.lerp(start, end, t) for t in ts])


def _repeated(piece: Batch, times: int) -> Batch:
    """Return the targets of a piece for the outputs of several networks on it."""
    targets = piece.targets
    if isinstance(targets, Tensor):
        targets = targets.repeat(times, *[1] * (targets.ndim - 1))
    return Batch((), {}, targets)


def _inputs(piece: Batch) -> list[Tensor]:
    """Return the tensors that a network reads, without the labels that are among them."""
    labels = {"labels", piece.target_key}
    leaves = pytree.tree_leaves((piece.args, {k: v for k, v in piece.kwargs.items() if k not in labels}))
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


def _bytes(kept: Any) -> int:
    return sum(v.numel() * v.element_size() for v in pytree.tree_leaves(kept) if isinstance(v, Tensor))


def _stacked(columns: Sequence[Tensor | None]) -> Tensor | None:
    known = [c for c in columns if c is not None]
    return torch.stack(known) if len(known) == len(columns) else None


def _unless_equal_or_none(weights: Tensor | None) -> Tensor | None:
    return None if weights is None else unless_equal(weights)
