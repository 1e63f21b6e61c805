r"""Permutations found by gradient: straight-through, and differentiable Sinkhorn, on the loss between two networks.

Both start from another method's permutations, take steps of Adam on the training loss at the midpoint, or at random
positions, and keep the *hard* permutations that do best on training batches held out, the start among them.

Straight-through (Ainsworth et al. 2023, section 3.3) moves free tensors :math:`\hat\theta`. In each step B is matched
to them by full weight matching, the loss is that of B so relabelled, and its gradient is passed on to
:math:`\hat\theta`. The descent of the matching starts from where the last one ended; the paper solves anew each time.

Sinkhorn (Guerrero et al. 2023) runs the network on soft permutations: logits, balanced to rows and columns of sum one.
There the derivative of the balanced matrix is found implicitly; here the iterations are differentiated.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from isthmus.couplings import Coupling, Permutation
from isthmus.errors import DataError
from isthmus.losses import Loss
from isthmus.matching._between import LossBetween, split_batches
from isthmus.matching._problem import Problem
from isthmus.matching._schedules import CoordinateDescent, Match, Status
from isthmus.matching._soft import SoftPermutation, as_matrices, carried_softly, rounded
from isthmus.matching._solvers import assignment_solver
from isthmus.matching._terms import LayeredPair, weight_objective
from isthmus.symmetry import Couplings, carry_tensor

__all__ = ["GradientSearch"]

_BALANCINGS = 20
"""Sinkhorn's iterations."""
_POSITIONS = (0.25, 0.5, 0.75)
_FIRST_MASS = 2.0
"""How much a unit's partner weighs at the start, as the logarithm of the ratio to all others together."""


@dataclass(frozen=True)
class GradientSearch:
    """Settings of a search for permutations by gradient.

    Attributes:
        by: ``"straight-through"`` or ``"sinkhorn"``.
        steps: of Adam.
        learning_rate: tune this first: too small, and no unit changes its partner.
        batch_size: examples of a step.
        random: draw the position of every step between 0 and 1, instead of taking the midpoint.
        every: steps between looks at the held-out batches.
        loss: see :data:`isthmus.losses.Loss`.

    Raises:
        DataError: a number out of range.
    """

    by: Literal["straight-through", "sinkhorn"]
    steps: int = 200
    learning_rate: float = 1e-3
    batch_size: int = 1000
    random: bool = False
    every: int = 20
    loss: Loss | None = None

    def __post_init__(self) -> None:
        """Check the settings."""
        if min(self.steps, self.batch_size, self.every) < 1 or not self.learning_rate > 0:
            raise DataError(
                f"{self.by}: expected steps, batch_size and every of at least 1 and a learning_rate above 0, found "
                f"{self.steps}, {self.batch_size}, {self.every} and {self.learning_rate}."
            )

    def run(self, problem: Problem, start: Match, generator: torch.Generator) -> Match:
        """Return the best hard permutations seen, the start among them.

        The trace is minus the lowest loss on the held-out batches so far, look after look.

        Args:
            problem: the networks and labelled data; nothing of theirs is changed.
            start: permutations to start from.
            generator: draws batches and positions.

        Raises:
            DataError: groups that are to be more than permuted, or batches without targets.
        """
        if not problem.permutes:
            raise DataError(
                f"{self.by} permutes units, found symmetry={problem.symmetry!r}. Use symmetry='permutations', "
                "and match by activations for larger classes."
            )
        learning, held = split_batches(problem, self.batch_size, generator)
        between = LossBetween(problem, self.loss)
        search = (_StraightThrough if self.by == "straight-through" else _Sinkhorn)(
            problem, between, start.couplings
        )
        optimiser = torch.optim.Adam(search.leaves, lr=self.learning_rate) if search.leaves else None
        positions = _POSITIONS if self.random else (0.5,)
        best, best_loss = (
            dict(start.couplings),
            between.mean(search.tensors(start.couplings), positions, held),
        )
        trace = [-best_loss]
        for step in range(self.steps if optimiser is not None else 0):
            assert optimiser is not None
            batch = learning[int(torch.randint(len(learning), (), generator=generator))]
            t = float(torch.rand((), generator=generator)) if self.random else 0.5
            optimiser.zero_grad()
            between(search.differentiable(), t, batch)[0].backward()
            optimiser.step()
            if (step + 1) % self.every == 0 or step + 1 == self.steps:
                found = search.permutations()
                loss = between.mean(search.tensors(found), positions, held)
                if loss < best_loss:
                    best, best_loss = {**best, **found}, loss
                trace.append(-best_loss)
        return Match(best, tuple(trace), Status.TRAINED)


class _Moved:
    """B's tensors under permutations."""

    def __init__(self, problem: Problem, between: LossBetween, start: Couplings) -> None:
        self._problem, self._table = problem, problem.layers.table
        self._b = {name: problem.state_b[name].detach() for name in between.own}
        self._moving = [n for n, b in self._b.items() if self._table.get(n) and b.is_floating_point()]
        self.at: dict[str, Coupling] = {n: Permutation(c.index) for n, c in start.items()}  # pyright: ignore

    def tensors(self, at: Couplings) -> dict[str, Tensor]:
        """Return B's tensors relabelled."""
        return {**self._b, **{n: carry_tensor(self._b[n], self._table[n], at) for n in self._moving}}


class _StraightThrough(_Moved):
    def __init__(self, problem: Problem, between: LossBetween, start: Couplings) -> None:
        super().__init__(problem, between, start)
        moved = self.tensors(start)
        learnt = [n for n in self._moving if n in set(problem.layers.parameters)]
        self._free = {n: moved[n].clone().requires_grad_() for n in learnt}
        self.leaves = list(self._free.values())

    def permutations(self) -> dict[str, Coupling]:
        """Return the permutations that bring B closest to the free tensors, from the last ones on."""
        state = {**self._problem.state_a, **{n: t.detach() for n, t in self._free.items()}}
        objective = weight_objective(LayeredPair(self._problem.layers, state, self._problem.state_b))
        source = torch.Generator().manual_seed(0)
        found = CoordinateDescent().run(objective, assignment_solver, self.at, source)
        self.at = dict(found.couplings)
        return self.at

    def differentiable(self) -> dict[str, Tensor]:
        """Return B relabelled, whose derivatives are those of the free tensors."""
        moved = self.tensors(self.permutations())
        return {**moved, **{n: moved[n] + (free - free.detach()) for n, free in self._free.items()}}


class _Sinkhorn(_Moved):
    def __init__(self, problem: Problem, between: LossBetween, start: Couplings) -> None:
        super().__init__(problem, between, start)
        sizes = problem.layers.sizes
        hard = as_matrices(start, sizes, torch.float32)
        kept = {n: m * (_FIRST_MASS + torch.tensor(float(len(m))).log()) for n, m in hard.items()}
        device = next(iter(self._b.values())).device if self._b else torch.device("cpu")
        self._logits = {n: m.to(device).requires_grad_() for n, m in kept.items() if len(m) > 1}
        self.leaves = list(self._logits.values())

    def permutations(self) -> dict[str, Coupling]:
        """Return the permutations of the largest sums of logits."""
        return {**self.at, **rounded(self._logits)}

    def differentiable(self) -> dict[str, Tensor]:
        """Return B's tensors, mixed by soft permutations."""
        at: Mapping[str, Coupling] = {n: SoftPermutation(_balanced(x)) for n, x in self._logits.items()}
        return {**self._b, **{n: carried_softly(self._b[n], self._table[n], at) for n in self._moving}}


def _balanced(logits: Tensor) -> Tensor:
    """Return the doubly stochastic matrix of logits (Sinkhorn's algorithm), rows last."""
    matrix = (logits - logits.detach().amax(1, keepdim=True)).exp()
    for _ in range(_BALANCINGS):
        matrix = matrix / matrix.sum(0, keepdim=True).clamp_min(torch.finfo(matrix.dtype).tiny)
        matrix = matrix / matrix.sum(1, keepdim=True).clamp_min(torch.finfo(matrix.dtype).tiny)
    return matrix
