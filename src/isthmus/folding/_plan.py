"""What of a traced network can be folded, what cannot and why; and the edits of a state that follow."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from isthmus.errors import DataError
from isthmus.folding._batch_norms import BatchFold, find_batch_folds
from isthmus.folding._edits import Edits
from isthmus.folding._gains import NormFold, find_norm_folds
from isthmus.folding._graph import ways_of
from isthmus.folding._means import MeanFold, find_mean_folds
from isthmus.folding._uses import Refusal, TensorUses
from isthmus.states import State, with_versions_of
from isthmus.symmetry import Outputs, Trace

__all__ = ["PARTS", "FoldPlan", "edited", "plan_folds"]

PARTS = ("batch-norms", "biases", "gains", "means")
"""What can be folded, in the order in which it is."""


@dataclass(frozen=True, eq=False)
class FoldPlan:
    """Folds that a network allows, whatever its weights are.

    Attributes:
        batch_norms: BatchNorms that go into their layer.
        norms: gains and biases that go into the layers that read the norm.
        means: streams whose mean goes out of what writes them.
        refusals: what stays, and why.
        aliases: from name to all names of the same tensor.
    """

    batch_norms: tuple[BatchFold, ...]
    norms: tuple[NormFold, ...]
    means: tuple[MeanFold, ...]
    refusals: tuple[Refusal, ...]
    aliases: Mapping[str, tuple[str, ...]]

    @property
    def tied(self) -> tuple[str, ...]:
        """Names that would have to lead to a tensor of their own."""
        return tuple(dict.fromkeys(name for refusal in self.refusals for name in refusal.apart))

    @property
    def lacking(self) -> tuple[str, ...]:
        """Weights of layers that would need a bias to take up another one."""
        kept = (fold.site.weight for fold in self.batch_norms if fold.keeps_shift)
        return tuple(dict.fromkeys((*(name for r in self.refusals for name in r.lacking), *kept)))

    @property
    def folds(self) -> tuple[BatchFold | NormFold | MeanFold, ...]:
        """All folds in the order in which they are made."""
        return (*self.batch_norms, *self.norms, *self.means)

    def only(self, fold: BatchFold | NormFold | MeanFold) -> FoldPlan:
        """Return the plan of one of its folds."""
        return replace(
            self,
            batch_norms=tuple(f for f in self.batch_norms if f is fold),
            norms=tuple(f for f in self.norms if f is fold),
            means=tuple(f for f in self.means if f is fold),
        )

    def fitting(self, state: Mapping[str, Tensor]) -> FoldPlan:
        """Return the plan without what the values of a state forbid: a gain of zero under a bias that must stay."""
        state = self.named(state)
        bad = {fold.name: why for fold in self.norms if (why := fold.forbidden(state))}
        kept = tuple(f.without_gain() if f.name in bad else f for f in self.norms)
        more = tuple(Refusal(name, "gain", why) for name, why in bad.items())
        return replace(self, norms=tuple(f for f in kept if f.moves), refusals=(*self.refusals, *more))

    @property
    def centred(self) -> tuple[str, ...]:
        """Names of the tensors whose mean over the channels of a stream goes."""
        return self._all_names(name for fold in self.means for name, _ in fold.writers)

    def gains_at_one(self, state: Mapping[str, Tensor]) -> tuple[str, ...]:
        """Return the names of gains that were folded and are one, all entries, in a state."""
        found = [(f.gain.name, 1.0 - f.offset) for f in self.norms if f.moves_gain and f.gain is not None]
        found += [(f.norm.weight, 1.0) for f in self.batch_norms if f.norm.weight is not None]
        return self._all_names(
            name for name, value in found if bool((self.named(state)[name] == value).all())
        )

    def biases_at_zero(self, state: Mapping[str, Tensor]) -> tuple[str, ...]:
        """Return the names of norms' biases that were folded and are zero, all entries, in a state."""
        found = [f.bias.name for f in self.norms if f.moves_bias and f.bias is not None]
        found += [f.norm.bias for f in self.batch_norms if f.norm.bias is not None and not f.keeps_shift]
        return self._all_names(name for name in found if bool((self.named(state)[name] == 0).all()))

    def _all_names(self, names: Iterable[str]) -> tuple[str, ...]:
        return tuple(dict.fromkeys(other for name in names for other in self.aliases.get(name, (name,))))

    def edits(self, state: Mapping[str, Tensor]) -> Edits:
        """Return the steps that fold a state (dtypes and shapes are looked at)."""
        shapes = self.named(state)
        return Edits(
            [
                *(step for fold in self.batch_norms for step in fold.steps(shapes)),
                *(step for fold in self.norms for step in fold.bias_steps()),
                *(step for fold in self.norms for step in fold.gain_steps()),
                *(step for fold in self.means for step in fold.steps()),
            ]
        )

    def named(self, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return a state that is also found under the first name of every tensor."""
        return _FirstNames(state, self.aliases)

    def apply(self, state: Mapping[str, Tensor]) -> State:
        """Return a folded state: edited in float64, in the dtypes of the source; other tensors are shared with it."""
        fitting = self.fitting(state)
        return edited(state, fitting.edits(state), self.aliases)


def edited(state: Mapping[str, Tensor], edits: Edits, aliases: Mapping[str, tuple[str, ...]]) -> State:
    """Return a state after edits; tensors of several names stay one."""
    named = _FirstNames(state, aliases)
    made: State = dict(state)
    for name in edits.targets:
        value = edits.value(named, name).to(named[name].dtype)
        for other in aliases.get(name, (name,)):
            if other in made:
                made[other] = value
    return with_versions_of(state, made)


class _FirstNames(Mapping[str, Tensor]):
    """A state in which a tensor is found under its first name, whichever of its names the state has."""

    def __init__(self, state: Mapping[str, Tensor], aliases: Mapping[str, tuple[str, ...]]) -> None:
        self._state = state._state if isinstance(state, _FirstNames) else state
        self._aliases = aliases

    def __getitem__(self, name: str) -> Tensor:
        found = next((n for n in self._aliases.get(name, (name,)) if n in self._state), name)
        return self._state[found]

    def __iter__(self) -> Iterator[str]:
        return iter(self._state)

    def __len__(self) -> int:
        return len(self._state)


def plan_folds(traced: Trace, *, outputs: Outputs = None, parts: Collection[str] = PARTS) -> FoldPlan:
    """Return what of a traced network can be folded; no weight is read.

    Args:
        traced: the network.
        outputs: what must be preserved; default: every output.
        parts: which of :data:`PARTS`.

    Raises:
        DataError: an unknown part.
        SymmetryError: ``outputs`` names nothing the model returns.
        ModelError: the trace holds what the module computed from its weights in a way that cannot be traced.
    """
    unknown = sorted(set(parts) - set(PARTS))
    if unknown:
        raise DataError(f"Folding {unknown[0]!r}: expected some of {', '.join(PARTS)}.")
    ways = ways_of(traced, outputs)
    for way in ways:
        way.traced.require_of_state()
    uses = TensorUses(ways)
    batch, refused = find_batch_folds(uses) if "batch-norms" in parts else ((), ())
    norms, more = find_norm_folds(uses, gains="gains" in parts, biases="biases" in parts)
    means, others = find_mean_folds(uses, norms) if "means" in parts else ((), ())
    refusals = (*refused, *more, *others)
    return FoldPlan(tuple(batch), tuple(norms), tuple(means), refusals, traced.aliases)
