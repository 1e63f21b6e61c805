r"""Activations and weights in turn, and of all that was passed through what is best on the path.

Units of transformers are turned, mixed and permuted at once: what is best for heads and hidden units depends on how
the stream is turned. The search begins with the stream, turned by the normed activations at all places that read it,
once as they are and once with every place counted alike (its covariance divided by its nuclear norm). Then, round after
round: what is nested (heads, by their balanced circuits), what is left (hidden units), both by their weights, and the
stream again, by relative weights,

.. math:: \max_Q \sum_W \frac{\langle W_A, W_B' \rangle}{\lvert W_A \rvert \lvert W_B \rvert},

in which no large layer speaks for all. Nearer weights are not always a lower barrier, so whatever was passed through
is a candidate, and the one whose midpoint with A has the least loss on the data is taken. Nothing is trained.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch

from isthmus.couplings import Coupling, Permutation
from isthmus.errors import DataError, IsthmusWarning
from isthmus.evaluation import combine_states, evaluate
from isthmus.matching._activations import ActivationMatching
from isthmus.matching._by_class import ByClass
from isthmus.matching._classes import solvers_of
from isthmus.matching._grids import Cluster
from isthmus.matching._incremental import Incremental
from isthmus.matching._objectives import MomentObjective
from isthmus.matching._problem import Problem
from isthmus.matching._schedules import Match, Schedule, Status
from isthmus.matching._solvers import Assignment, BalancedProcrustes, Solver
from isthmus.matching._terms import weight_objective
from isthmus.matching._working import At, working
from isthmus.symmetry import Relabelling

__all__ = ["Alternation"]

_log = logging.getLogger(__name__)
MOST_ROUNDS = 4
"""Rounds from each start after which it gives up; the status says so. What the path thinks best came earlier mostly."""
_LITTLE = 1e-9
"""Largest change of an entry of a coupling that counts as none."""

_Candidate = tuple[str, At]


@dataclass(eq=False)
class Alternation:
    """Matches all groups of two networks in turn, and keeps what is best on the path.

    Args:
        problem: the networks and data, with targets if what is best on the path is to be told.
        schedule: goes on from the activations by weights instead of the rounds.
        generator: for the schedules.

    Attributes:
        objective: weights, by which the rounds go and costs are told.
        notes: remarks for the reader; complete after :meth:`run`.

    Source:
        Streams turned on normed activations and heads matched by their circuits: Theus 2025. The rest is ours.
    """

    problem: Problem
    schedule: Schedule | None
    generator: torch.Generator
    notes: tuple[str, ...] = field(default=(), init=False)

    def __post_init__(self) -> None:
        """Build the objectives, and sort the clusters."""
        self.objective = Incremental(weight_objective(self.problem.pair))
        self._solver = _solver(self.problem)
        self._plain = working(self.objective, self._solver, None)
        self._relative = working(weight_objective(self.problem.pair.relative()), self._solver, None)
        clusters = self.objective.structure.clusters
        self._turned = [c for c in clusters if self._turns(c)]
        self._nests = [c for c in clusters if len(c) > 1 and c not in self._turned]
        self._alone = [c for c in clusters if len(c) == 1 and c not in self._turned]
        self._status = Status.SWEEP_LIMIT

    def run(self) -> Match:
        """Return the couplings of the chosen candidate."""
        found = list(self.candidates())
        losses = [loss for _, at in found if (loss := self._middle(at)) is not None]
        if len(losses) < len(found):
            (_, chosen), note = found[-1], "the data cannot be scored, so the last round was taken"
        else:
            k = min(range(len(losses)), key=losses.__getitem__)
            name, chosen = found[k]
            note = (
                f"of {len(found)} candidates the one of least loss in the middle of the path was taken: {name}, "
                f"{losses[k]:.4f} on these data; the last had {losses[-1]:.4f}"
            )
        self.notes += (note,)
        _log.info(note)
        return Match(chosen, (self.objective.value(chosen),), self._status)

    def candidates(self) -> Iterator[_Candidate]:
        """Yield all that is passed through, each with a name."""
        matching = ActivationMatching(self.problem, True, None, self.generator, self._solver)
        start, seen = matching.run()
        self.notes += matching.notes
        yield "activations", start.couplings
        if self.schedule is not None:
            match = self.schedule.run(self.objective, self._solver, start.couplings, self.generator)
            self._status = match.status
            yield "the schedule's end", match.couplings
            return
        if not self._turned:
            yield from self._rounds(start.couplings, "")
            return
        sizes = self.objective.structure.sizes
        still = {n: Permutation.identity(size) for n, size in sizes.items()}
        turned = {n: start.couplings[n] for c in self._turned for n in c}
        yield from self._rounds({**still, **turned}, "")
        alike = {c[0]: self._places_alike(c, seen) for c in self._turned if c in seen.seen}
        if alike:
            yield from self._rounds({**still, **turned, **alike}, ", places alike")

    def _places_alike(self, cluster: Cluster, seen: MomentObjective) -> Coupling:
        """Return the turn of a stream when every place that reads it counts alike."""
        (name,) = cluster
        assert isinstance(self._solver, ByClass)
        gains = [g.reduced(name) for g in seen.gains(cluster, {})]
        sizes = [float(torch.linalg.svdvals(g).sum()) for g in gains]
        return self._solver.of(name)(
            torch.stack([g / (size or 1.0) for g, size in zip(gains, sizes, strict=True)]).sum(0)
        )

    def _rounds(self, at: At, start: str) -> Iterator[_Candidate]:
        self._status = Status.SWEEP_LIMIT
        for number in range(1, MOST_ROUNDS + 1):
            before = at
            for what, clusters, by_relative in (
                ("heads", self._nests, False),
                ("units", self._alone, False),
                ("stream", self._turned, True),
            ):
                if clusters:
                    at = self._moved(clusters, at, by_relative=by_relative)
                    yield f"{what} of round {number}{start}", at
            if _same(before, at):
                self._status = Status.CONVERGED
                return

    def _moved(self, clusters: Sequence[Cluster], at: At, *, by_relative: bool) -> At:
        work = self._relative if by_relative else self._plain
        for cluster in clusters:
            change, _ = work.change(cluster, at)
            at = self.objective.structure.followed(at, cluster, change)
        return at

    def _turns(self, cluster: Cluster) -> bool:
        return len(cluster) == 1 and isinstance(self._solver, ByClass) and self._solver.turns(cluster[0])

    def _middle(self, at: At) -> float | None:
        """Return the loss half way from A to B under couplings, ``None`` where the data cannot be scored."""
        problem = self.problem
        moved = Relabelling(problem.spec, dict(at)).apply(problem.state_b)
        state = combine_states([problem.state_a, moved], lambda both: 0.5 * (both[0] + both[1]), check=False)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", IsthmusWarning)  # the line that is measured later will say it
                return evaluate(problem.model_a, problem.batches, state=state).loss
        except DataError:
            return None


def _same(one: At, other: At) -> bool:
    """Return whether couplings are the same, those that mix units up to rounding."""
    for name, coupling in one.items():
        if isinstance(coupling, Permutation) and isinstance(other[name], Permutation):
            if coupling != other[name]:
                return False
        elif float((coupling.matrix() - other[name].matrix()).abs().max()) > _LITTLE:
            return False
    return True


def _solver(problem: Problem) -> Solver:
    """Return the solvers by class; heads by balanced circuits, one step where least squares takes many."""
    if problem.permutes:
        return Assignment()
    usual = solvers_of(problem.classes).solvers
    return ByClass({n: BalancedProcrustes() if s.acts == "general" else s for n, s in usual.items()})
