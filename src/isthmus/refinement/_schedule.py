"""Refinement as a schedule and as a method, for ``align`` and everything that reads ``METHODS``."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from isthmus.couplings import Permutation, as_coupling
from isthmus.losses import Loss
from isthmus.matching import (
    Found,
    Match,
    Method,
    Objective,
    Problem,
    Schedule,
    Solver,
    Status,
    Symmetry,
    classes_of,
    method_named,
)
from isthmus.refinement._refine import refined
from isthmus.refinement._search import Learnt
from isthmus.refinement._settings import RefineSettings
from isthmus.symmetry import Couplings

__all__ = ["REFINED", "Refine", "refined_method"]


@dataclass(frozen=True)
class Refine:
    """Refine what a schedule before it found: ``Then(start, Refine(problem))``.

    A schedule is given an objective, and the loss on the path is none: it has no gain matrices. So this one brings the
    networks and the data itself, and leaves objective and solver alone.

    Attributes:
        problem: the networks that are matched, and training data with targets.
        settings: budget and rate; the seed is that of the schedule's generator where the seed is None.
        loss: see :data:`isthmus.losses.Loss`.
        symmetry: what may be learnt.

    Example:
        >>> import torch, isthmus
        >>> from isthmus.matching import Problem, SinglePass, Then
        >>> a, b = (torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.ReLU(), torch.nn.Linear(3, 2)) for _ in "ab")
        >>> data = [(torch.randn(8, 2), torch.tensor([0, 1] * 4))]
        >>> schedule = Then(SinglePass(), Refine(Problem(a, b, batches=data), RefineSettings(steps=2)))
        >>> isthmus.align(a, b, batches=data, method="correlation", schedule=schedule).kinds
        {'Monomial': 1}
    """

    problem: Problem = field(repr=False)
    settings: RefineSettings = field(default_factory=RefineSettings)
    loss: Loss | None = None
    symmetry: Symmetry = "all"

    def run(
        self, objective: Objective, solver: Solver, start: Couplings | None, generator: torch.Generator
    ) -> Match:
        """Return the start refined; groups that it lacks begin as they are."""
        at = {name: as_coupling(coupling) for name, coupling in (start or {}).items()}
        classes = classes_of(self.problem.spec, self.symmetry)
        found = refined(self.problem, at, self.settings, self.loss, classes=classes)
        missing = {n: Permutation.identity(s) for n, s in objective.structure.sizes.items()}
        return _match({**missing, **found.couplings}, found)


def _match(couplings: Couplings, found: Learnt) -> Match:
    return Match(couplings, tuple(-value for _, value in found.trace), Status.BUDGET)  # pyright: ignore[reportArgumentType]


def refined_method(
    start: str | Method = "correlation",
    settings: RefineSettings | None = None,
    *,
    name: str | None = None,
    loss: Loss | None = None,
    symmetry: Symmetry = "all",
) -> Method:
    """Return a method that refines what another one finds, for ``align(method=...)``, studies and comparisons.

    Args:
        start: the method that it begins with.
        settings: budget and rate.
        name: of the method; default: that of the start with ``-refined``.
        loss: see :data:`isthmus.losses.Loss`. Data need targets.
        symmetry: what may be learnt, whatever classes the start is matched by.

    Raises:
        DataError: no such method.
    """
    first, used = method_named(start), settings or RefineSettings()

    def search(problem: Problem, schedule: Schedule | None, generator: torch.Generator) -> Found:
        begun = first.run(problem, schedule, generator)
        classes = classes_of(problem.spec, symmetry)
        found = refined(problem, begun.match.couplings, used, loss, classes=classes)
        match = _match({**begun.match.couplings, **found.couplings}, found)
        return Found(match, begun.objective, (*begun.notes, *found.notes))

    def objective(problem: Problem, generator: torch.Generator) -> Objective:
        return first.objective(problem, generator)

    return Method(
        name or f"{first.name}-refined",
        f"{first.label}, refined on the path",
        objective,
        needs="activations",
        source="Theus et al. 2025 for rotations; ours for factors",
        search=search,
    )


REFINED = refined_method("correlation", name="refined")
"""Correlation matching, refined by 500 steps: ``--method isthmus.refinement:REFINED``."""
