"""The search for the element that makes the path's loss small: Adam, and the best by what is held out."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from isthmus.couplings import Coupling
from isthmus.errors import ModelError
from isthmus.refinement._elements import Elements, LearntFactors
from isthmus.refinement._path_loss import PathLoss
from isthmus.refinement._settings import RefineSettings
from isthmus.refinement._state_file import StateFile
from isthmus.refinement._stream import TrainingStream, position

__all__ = ["Learnt", "Search"]

BETAS = (0.9, 0.99)
"""Averages of Adam: the second one short, since a search takes some hundred steps."""
_TURN = 0.1
"""Rate of rotations and maps, of that of factors: every entry of a large matrix moves at once."""
_TELL = 10
"""Steps between calls of the callback."""


@dataclass(frozen=True, eq=False)
class Learnt:
    """What a search found.

    Attributes:
        couplings: the best elements by group.
        trace: ``(step, held-out barrier)`` at every look, the first before the first step.
        best: the smallest of these barriers.
        steps: how many were taken.
        notes: remarks for the reader.
    """

    couplings: Mapping[str, Coupling]
    trace: tuple[tuple[int, float], ...]
    best: float
    steps: int
    notes: tuple[str, ...]


@dataclass(eq=False)
class Search:
    """A search, resumed from a file where there is one.

    Args:
        path: the loss.
        elements: where it begins; they are moved.
        stream: batches, and those held out.
        settings: budget and rate.
        file: where it is written from time to time.
        tell: told how much of the budget is spent, of a hundred.
    """

    path: PathLoss
    elements: Elements
    stream: TrainingStream
    settings: RefineSettings
    file: Path | None = None
    tell: Callable[[str, int, int], None] | None = None
    _trace: list[tuple[int, float]] = field(default_factory=list[tuple[int, float]], init=False)

    def run(self, identity: str) -> Learnt:
        """Return the best element that was seen.

        Args:
            identity: a digest of all that the search depends on; a file of another search is refused.
        """
        self._stored = None if self.file is None else StateFile(self.file, identity)
        self._optimiser = self._adam()
        self._notes: list[str] = []
        self._ends = self.path.means((0.0, 1.0), self._at(), self.stream.held_out)
        step, before = self._resumed()
        if not self._trace:
            self._look(0)
        begun, settings = time.monotonic() - before, self.settings
        while (spent := settings.spent(step, time.monotonic() - begun)) < 1.0:
            if self.tell is not None and step % _TELL == 0:
                self.tell("refining on the path", round(100 * spent), 100)
            if not self._step(step, spent):
                break
            step += 1
            if step % settings.every == 0:
                self._look(step)
                self._write(step, time.monotonic() - begun)
        if self._trace[-1][0] != step:
            self._look(step)
            self._write(step, time.monotonic() - begun)
        self.elements.put(self._best)
        best = min(value for _, value in self._trace)
        return Learnt(self.elements.values(), tuple(self._trace), best, step, tuple(self._notes))

    def _adam(self) -> torch.optim.Adam:
        rate = self.settings.rate
        groups = [
            {"params": [part.tangent], "lr": rate if isinstance(part, LearntFactors) else _TURN * rate}
            for part in self.elements.parts.values()
        ]
        for group in groups:
            group["full"] = group["lr"]
        return torch.optim.Adam(groups, betas=BETAS)

    def _step(self, step: int, spent: float) -> bool:
        """Take one step; return whether the loss is a number."""
        spread = self.settings.spread
        if spread is None:  # rotations and maps that are learnt at the middle alone fit it and little else
            spread = (
                0.0 if all(isinstance(part, LearntFactors) for part in self.elements.parts.values()) else 1.0
            )
        t = 0.5 + spread * (position(self.settings.seed, step) - 0.5)
        at = self.elements.couplings(self.path.dtype)
        loss, _ = self.path.loss(t, at, self.stream.batch(step))
        if not bool(torch.isfinite(loss)):
            self._notes.append(
                f"the loss on the path was {float(loss.detach()):g} in step {step}, and the search ended there"
            )
            return False
        gradients = torch.autograd.grad(loss, self.elements.tangents, allow_unused=True)
        for tangent, gradient in zip(self.elements.tangents, gradients, strict=True):
            tangent.grad = gradient
        for group in self._optimiser.param_groups:
            group["lr"] = group["full"] * 0.5 * (1 + math.cos(math.pi * spent))
        self._optimiser.step()
        self.elements.move()
        return True

    @torch.no_grad()
    def _at(self) -> dict[str, Coupling]:
        return self.elements.couplings(self.path.dtype)

    def _look(self, step: int) -> None:
        """Score what is held out, and keep the elements if they are the best."""
        value = self.path.excess(self._at(), self.stream.held_out, self._ends)
        if not self._trace and not math.isfinite(value):
            raise ModelError(
                f"Refining on the path: the loss of the networks, or between them, on held-out batches is {value:g}. "
                "Look for NaN in the inputs, a diverged network, or overflow in half precision."
            )
        if not self._trace or value < min(v for _, v in self._trace):
            self._best = self.elements.tensors()
        self._trace.append((step, value if math.isfinite(value) else math.inf))

    def _write(self, step: int, seconds: float) -> None:
        if self._stored is not None:
            self._stored.write(
                step, seconds, self._trace, self.elements.tensors(), self._best, self._moments()
            )

    def _resumed(self) -> tuple[int, float]:
        """Return the step and the seconds to go on from."""
        kept = None if self._stored is None else self._stored.read()
        if kept is None:
            return 0, 0.0
        self.elements.put(kept.elements)
        self._best, self._trace = kept.best, list(kept.trace)
        for k, tangent in enumerate(self.elements.tangents):
            own = {
                n: kept.moments[f"{k}.{n}"]
                for n in ("step", "exp_avg", "exp_avg_sq")
                if f"{k}.{n}" in kept.moments
            }
            if own:
                self._optimiser.state[tangent] = {
                    n: t.to(tangent.device) if t.ndim else t for n, t in own.items()
                }
        return kept.step, kept.seconds

    def _moments(self) -> dict[str, Tensor]:
        """Return what the optimiser remembers."""
        found: dict[str, Tensor] = {}
        for k, tangent in enumerate(self.elements.tangents):
            found |= {f"{k}.{name}": t for name, t in self._optimiser.state.get(tangent, {}).items()}
        return found
