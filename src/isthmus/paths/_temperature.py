r"""One temperature for a mixed network: its logits divided by the number that serves its cross-entropy best.

Mixed networks are less sure than they are right, since their outputs vary less; a factor on the logits makes up for
that part of a barrier and changes no prediction (Guo et al. 2017, arXiv:1706.04599, section 4.2; for mixed networks
arXiv:2510.08023).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from isthmus.batches import Batches, first_batch, iterate, reusable
from isthmus.errors import DataError, ModelError
from isthmus.evaluation import bind, relative_difference, require_evaluation
from isthmus.losses import Loss, Scorer, class_rows, completed, outputs_to_score, scorer_for
from isthmus.paths._held import HeldLayer, output_layer
from isthmus.replica import Replica
from isthmus.states import State, with_versions_of

__all__ = ["Temperature"]

_LARGEST = 100.0
"""Temperatures are sought between this and its inverse."""
_STEPS, _SETTLED = 60, 1e-10
_KEPT_BYTES = 2**28


@dataclass(frozen=True)
class _Slope:
    """Derivatives of the mean cross-entropy in the factor on the logits, and how many rows are wrong."""

    first: float
    second: float
    wrong: int


class Temperature:
    """From a state to the one whose logits are divided by the temperature that is best on the data.

    The factor goes into the weight and bias of the layer whose output the network returns.

    Args:
        model: the architecture, in evaluation mode; a copy is run.
        state: any state of it, to see its last layer.
        batches: training data with labels.
        loss: see :data:`isthmus.losses.Loss`; it must be plain cross-entropy of labels.
        read: from all that the network returns to the output that is scored; None takes the usual one.

    Raises:
        ModelError: naming a last layer that cannot take the factor.
        DataError: another loss than cross-entropy.
    """

    def __init__(
        self,
        model: nn.Module | Replica,
        state: State,
        batches: Batches,
        *,
        loss: Loss | None = None,
        read: Callable[[Any], Tensor] | None = None,
    ) -> None:
        self._replica = Replica.of(model)
        require_evaluation(self._replica.source)
        source, self._batches = self._replica.source, reusable(batches)
        first = completed(source, first_batch(self._batches))
        whole = bind(self._replica, state, read=lambda output: output)
        self._scorer: Scorer = scorer_for(loss, source, first, whole, read)
        self._first = self._scorer.prepare(first)
        self._read: Callable[[Any], Tensor] = outputs_to_score if read is None else read
        self._layer: HeldLayer = output_layer(self._replica, state, self._first, self._read)

    @property
    def writes(self) -> frozenset[str]:
        """Names of the tensors that may be changed."""
        return frozenset(self._layer.tensors)

    def __call__(self, state: State, shares: Sequence[float] = (), where: str = "in the average") -> State:
        """Return the state with the temperature folded in; shares are not looked at.

        Raises:
            ModelError: the outputs do not follow the last layer's factor, or no temperature is best.
        """
        factor = 1 / self.fitted(state, where)
        units = state[self._layer.weight].shape[self._layer.weight_axis]
        factors = torch.full((units,), factor, dtype=torch.float64)
        changed = {**state, **self._layer.scaled(state, factors, torch.zeros_like(factors))}
        found = with_versions_of(state, changed)
        self._require_scaled(state, found, factor, where)
        return found

    def fitted(self, state: State, where: str = "in the average") -> float:
        """Return the temperature that is best for a state: logits are divided by it.

        The loss is convex in the factor, whose best value is found by safeguarded Newton steps.

        Raises:
            ModelError: none is best: the network is right about all data, or no better than chance.
        """
        low, high = 1 / _LARGEST, _LARGEST
        factor, rows = 1.0, self._rows(state)
        if _slope(rows(), 0.0).first >= 0:
            raise ModelError(_none_best(where, "it is no better than chance"))
        for _ in range(_STEPS):
            slope = _slope(rows(), factor)
            if not slope.wrong:
                raise ModelError(_none_best(where, "it is right about all of them"))
            low, high = (factor, high) if slope.first < 0 else (low, factor)
            step = factor - slope.first / slope.second if slope.second > 0 else high
            tried = step if low < step < high else (low * high) ** 0.5
            if abs(tried - factor) <= _SETTLED * factor:
                break
            factor = tried
        return 1 / factor

    def _rows(self, state: State) -> Callable[[], Iterator[tuple[Tensor, Tensor]]]:
        """Return a function that yields logits and labels, kept if they fit in 256 MiB, else computed again."""
        run = bind(self._replica, state, self._scorer.read)

        def computed() -> Iterator[tuple[Tensor, Tensor]]:
            for given in iterate(self._batches):
                batch = self._scorer.prepare(completed(self._replica.source, given))
                found = class_rows(self._scorer, run(batch), batch)
                if found is None:
                    raise DataError(
                        f"A temperature is fitted by cross-entropy of logits and labels; the loss is "
                        f"{self._scorer.name}. Choose a repair without +temperature."
                    )
                yield found[0].double(), found[1]

        kept: list[tuple[Tensor, Tensor]] | None = []
        size = 0
        for logits, labels in computed():
            size += logits.numel() * 8
            if size > _KEPT_BYTES:
                kept = None
                break
            kept.append((logits, labels))
        return computed if kept is None else lambda: iter(kept)

    def _require_scaled(self, before: State, after: State, factor: float, where: str) -> None:
        plain, scaled = (bind(self._replica, state, self._read)(self._first) for state in (before, after))
        error = relative_difference(plain.double() * factor, scaled.double())
        if error > 64 * torch.finfo(plain.dtype).eps:
            raise ModelError(
                f"Scaling the outputs {where}: they are not what {self._layer.path!r} gives (off by {error:.2g} of the "
                "largest), so no temperature can be folded in. Return logits, as the last layer gives them."
            )


def _none_best(where: str, why: str) -> str:
    return (
        f"No temperature is best for the network {where}: on these data {why}. Give other data, or leave the "
        "temperature out."
    )


def _slope(rows: Iterator[tuple[Tensor, Tensor]], factor: float) -> _Slope:
    first = second = 0.0
    count = wrong = 0
    for logits, labels in rows:
        if not len(labels):
            continue
        shares = (factor * logits).softmax(-1)
        mean = (shares * logits).sum(-1)
        variance = (shares * (logits - mean[:, None]).square()).sum(-1)
        right = logits.gather(-1, labels[:, None]).squeeze(-1)
        first, second = first + float((mean - right).sum()), second + float(variance.sum())
        count, wrong = count + len(labels), wrong + int((logits.argmax(-1) != labels).sum())
    if not count:
        raise DataError(
            "A temperature is fitted on labels, and every label of these data is one that is ignored."
        )
    return _Slope(first / count, second / count, wrong)
