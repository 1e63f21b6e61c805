"""Explaining a barrier: the front door."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn

from isthmus.batches import Batch, Batches, first_batch, iterate, reusable
from isthmus.errors import DataError, VerificationError
from isthmus.evaluation import Relabels, bind, checked_ends, evaluate
from isthmus.explanation._layers import LayerStatistics, LayerTally
from isthmus.explanation._prefixes import Stage, stage_names, stages_of
from isthmus.explanation._split import BarrierSplit, SplitTally
from isthmus.explanation._words import finding_words
from isthmus.losses import Loss, Scorer, Scores, class_rows, completed, scorer_for
from isthmus.paths import (
    HeldLayer,
    Path,
    Recompute,
    Refreshed,
    Straight,
    refreshed,
    repair_of,
    seen_layers,
    watched,
)
from isthmus.replica import Replica
from isthmus.states import State

__all__ = ["Explanation", "explain"]

_TOLERANCE = 1e-3
"""Most by which relabelling may change the loss of B, relative."""


@dataclass(frozen=True)
class Explanation:
    """Why the loss between two networks is what it is, on one data set.

    Attributes:
        t: the position that was looked at.
        losses: of A, of B, and at the point, in ``unit``.
        rise: how far the point's loss lies above the chord between those of A and B.
        unit: of the losses.
        split: the exact split of the rise; None for other losses than cross-entropy of labels.
        no_split: why there is none; empty otherwise.
        layers: correlation and variance of the layers, in the order in which they are run.
        stages: the rise with only the first layers at the point.
        findings: what that says, in sentences, the most important first.
        settings: how it was measured.
    """

    t: float
    losses: tuple[float, float, float]
    rise: float
    unit: str
    split: BarrierSplit | None
    no_split: str
    layers: tuple[LayerStatistics, ...]
    stages: tuple[Stage, ...]
    findings: tuple[str, ...]
    settings: Mapping[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Return numbers, text and lists only, fit for JSON."""
        return {**asdict(self), "settings": dict(self.settings)}

    def __str__(self) -> str:
        a, b, point = self.losses
        lines = [
            f"Loss at t = {self.t:g}: {point:.4g}; A {a:.4g}, B {b:.4g}; {self.rise:+.4g} above the chord "
            f"({self.unit})."
        ]
        if self.split is None:
            lines.append(self.no_split)
        else:
            s = self.split
            about = "" if s.error is None else f" ± {s.error:.2g}"
            lines.append(
                f"Rise {s.rise:.4g}{about} = {s.spread:+.4g} (normaliser) {-s.ensemble_gain:+.4g} (what the "
                f"ensemble gains) {-s.own:+.4g} (logit of the right class)."
            )
        return "\n".join([*lines, *(f"- {finding}" for finding in self.findings)])


def explain(
    model_a: nn.Module,
    model_b: nn.Module | Mapping[str, Tensor],
    batches: Batches,
    *,
    alignment: Relabels | None = None,
    t: float = 0.5,
    loss: Loss | None = None,
    train_batches: Batches | None = None,
    repair: str | None = None,
    stages: int = 12,
    on_stage: Callable[[str, int, int], None] | None = None,
) -> Explanation:
    """Explain the rise of the loss between two networks: what it consists of, who carries it, and where it arises.

    Args:
        model_a: a module in evaluation mode; its code also runs the point.
        model_b: another of the same architecture, or its state.
        batches: data with targets; iterated several times.
        alignment: relabelling of B, with ``apply(state) -> state``. The loss of B is that of the original.
        t: the position between them, above 0 and below 1; the weight of B.
        loss: see :data:`isthmus.losses.Loss`.
        train_batches: data on which running statistics are recomputed and repairs are made; default: ``batches``.
        repair: what is done at the point, as in :func:`isthmus.line`.
        stages: most steps in which layers are moved to the point one after another; 0 for none.
        on_stage: told the stage, and how many of how many steps are done.

    Returns:
        An :class:`Explanation`; print it for sentences.

    Raises:
        ModelError: training mode, NaN or infinite losses, or no module.
        CheckpointError, ShapeError: different architectures, or NaN or infinite weights.
        VerificationError: the alignment changes the loss of B by more than 1e-3 relative.
        DataError: empty data, no targets, ``t`` outside 0 to 1, or an unknown repair.

    Example:
        >>> import torch
        >>> net, data = nn.Linear(2, 3).eval(), [(torch.ones(4, 2), torch.tensor([0, 1, 2, 0]))]
        >>> explain(net, net, data).rise
        0.0
    """
    if not 0 < t < 1:
        raise DataError(f"Explaining a barrier: expected t between 0 and 1, found {t}.")
    if stages < 0:
        raise DataError(f"Explaining a barrier: expected stages of 0 or more, found {stages}.")
    tell = on_stage or (lambda stage, done, total: None)
    state_a, state_b, end = checked_ends(model_a, model_b, alignment, "Explaining a barrier")
    replica, data = Replica(model_a), reusable(batches)
    training = data if train_batches is None else reusable(train_batches)
    tell("repairing", 0, 1)
    path, done = _path(state_a, end, replica, training, repair, loss)
    point = path.at(t)
    tell("running the networks", 0, 1)
    seen = _Pass(replica, (state_a, end, point), state_b if alignment is not None else None, data, t, loss)
    a, original, middle = seen.losses
    rise = middle - ((1 - t) * a + t * original)
    layers = seen.layers
    found = _stages(replica, (state_a, end), point, t, data, loss, stages, partial(tell, "moving layers"))
    words = finding_words(t, rise, seen.split, layers, found, alignment is not None, done != "none")
    return Explanation(
        t=t,
        losses=(a, original, middle),
        rise=rise,
        unit=seen.unit,
        split=seen.split,
        no_split="" if seen.split is not None else seen.reason,
        layers=layers,
        stages=found,
        findings=words,
        settings={
            "loss": seen.name,
            "repair": done,
            "alignment": "none"
            if alignment is None
            else getattr(alignment, "method", type(alignment).__name__),
            "examples": seen.examples,
        },
    )


def _path(
    first: State, last: State, replica: Replica, training: Batches, repair: str | None, loss: Loss | None
) -> tuple[Path, str]:
    """Return the path, and the name of what is done at its points."""
    straight = Straight(first, last, check=False)
    if repair is None:
        path = refreshed(straight, "auto", replica, training)
        return path, "none" if path is straight else "batchnorm"
    found = repair_of(
        repair, replica, straight.ends, training, mix=lambda: (straight.at(0.5), (0.5, 0.5)), loss=loss
    )
    return Refreshed(
        straight, Recompute(found.on_path, found.writes)
    ) if found.steps else straight, found.name


class _Pass:
    """One pass over the data with A, B and the point side by side."""

    def __init__(
        self,
        replica: Replica,
        states: tuple[State, State, State],
        original: State | None,
        data: Batches,
        t: float,
        loss: Loss | None,
    ) -> None:
        source = replica.source
        first = completed(source, first_batch(data))
        whole = bind(replica, states[0], read=lambda output: output)
        self._scorer: Scorer = scorer_for(loss, source, first, whole)
        seen = seen_layers(replica, states[0], self._scorer.prepare(first))
        self._tally, self._split = LayerTally(t), SplitTally(t)
        self._scores: list[list[Scores]] = [[], [], [], []]
        self._plain, self.examples = True, 0
        for given in iterate(data):
            batch = self._scorer.prepare(completed(source, given))
            self._take(replica, states, original, seen, batch)
        self.layers = self._tally.result(seen)
        self.name, self.unit = self._scorer.name, self._scorer.unit(first)
        self.reason = (
            f"The exact split is one of the cross-entropy of logits and labels; the loss here is {self.name}, of which "
            "it does not hold."
        )
        self.split: BarrierSplit | None = self._split.result() if self._plain else None
        a, end, point, before = (Scores.cat(s).loss if s else None for s in self._scores)
        assert a is not None
        assert end is not None
        assert point is not None
        if before is not None and abs(before - end) > _TOLERANCE * max(abs(before), abs(end), _TOLERANCE):
            raise VerificationError(
                f"The alignment changes the function of B: its loss is {before:.6g}, and {end:.6g} after relabelling. "
                "A barrier measured with it would be wrong. Was the spec discovered on this architecture, and verified?"
            )
        self.losses = a, end if before is None else before, point

    def _take(
        self,
        replica: Replica,
        states: tuple[State, State, State],
        original: State | None,
        seen: tuple[HeldLayer, ...],
        batch: Batch,
    ) -> None:
        kept: list[Any] = []
        for k, state in enumerate(states):
            run = bind(replica, state, self._scorer.read)
            run.prepare(batch)
            with watched(replica.module, seen, self._tally.seeing(k)):
                kept.append(run(batch))
        self._tally.end()
        if original is not None:
            kept.append(bind(replica, original, self._scorer.read)(batch))
        for scores, output in zip(self._scores, kept, strict=False):
            scores.append(self._scorer.score(output, batch))
        self.examples += batch.size
        b = kept[3] if original is not None else kept[1]
        rows = [class_rows(self._scorer, output, batch) for output in (kept[0], b, kept[2])]
        known = [r for r in rows if r is not None]
        if len(known) < len(rows):
            self._plain = False
        elif self._plain and len(known[0][1]):
            self._split.update(known[0][0], known[1][0], known[2][0], known[0][1])


def _stages(
    replica: Replica,
    ends: tuple[State, State],
    point: State,
    t: float,
    data: Batches,
    loss: Loss | None,
    most: int,
    on_step: Callable[[int, int], None],
) -> tuple[Stage, ...]:
    if most == 0:
        return ()
    names = stage_names(replica, ends[0], completed(replica.source, first_batch(data)), most)
    return stages_of(
        names, ends, point, t, lambda state: evaluate(replica, data, state=state, loss=loss).loss, on_step
    )
