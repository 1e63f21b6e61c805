r"""Gains and biases of norms into the layers that read the norm.

A norm gives :math:`\gamma \odot n + \beta`, and a reader computes :math:`W (\gamma \odot n + \beta) + b`. The same
function has :math:`b' = b + W\beta`, :math:`W' = W \operatorname{diag}(\gamma)`, :math:`\gamma' = 1`,
:math:`\beta' = 0`. Where some reader has no bias, :math:`\beta' = \beta / \gamma` stays in the norm.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from isthmus.errors import SymmetryError
from isthmus.folding._edits import EditStep, Filled, LookUp, MapPart, Scaled, Shifted, along
from isthmus.folding._moves import StatePart
from isthmus.folding._norms import Norm, norms_of
from isthmus.folding._readers import NotLinear, Reader, readers_of
from isthmus.folding._uses import Obstacle, Refusal, TensorUses, claims

__all__ = ["NormFold", "find_norm_folds"]


@dataclass(frozen=True, eq=False)
class NormFold:
    """A norm whose gain or bias goes into the layers that read it.

    Attributes:
        name: path of the norm's module.
        kind: ``LayerNorm``, ``RMSNorm``, ``GroupNorm`` or ``InstanceNorm``.
        gain: what multiplies.
        bias: what is added.
        offset: what code adds to the gain's tensor.
        readers: the layers, each weight and bias once.
        scaled: the layers, each weight once.
        moves_gain: whether the gain goes into them.
        moves_bias: whether the bias goes into theirs.
    """

    name: str
    kind: str
    gain: StatePart | None
    bias: StatePart | None
    offset: float
    readers: tuple[Reader, ...]
    scaled: tuple[Reader, ...]
    moves_gain: bool
    moves_bias: bool

    @property
    def moves(self) -> bool:
        """Whether anything goes anywhere."""
        return self.moves_gain or self.moves_bias

    @property
    def keeps_bias(self) -> bool:
        """Whether the bias stays beside a gain of one, divided by the gain that it had."""
        return self.moves_gain and self.bias is not None and not self.moves_bias

    @property
    def own(self) -> tuple[str, ...]:
        """Names of the norm's tensors that change."""
        moved = (
            self.gain if self.moves_gain else None,
            self.bias if self.moves_bias or self.keeps_bias else None,
        )
        return tuple(part.name for part in moved if part is not None)

    @property
    def into(self) -> tuple[str, ...]:
        """Names of the readers' tensors that change."""
        weights = [r.weight.name for r in self.readers if self.moves_gain]
        weights += [r.lengths.part.name for r in self.readers if self.moves_gain and r.lengths is not None]
        biases = [r.bias.name for r in self.readers if self.moves_bias and r.bias is not None]
        return tuple(dict.fromkeys((*weights, *biases)))

    def __str__(self) -> str:
        """Return one line."""
        what = " and ".join(w for w, moved in (("gain", self.moves_gain), ("bias", self.moves_bias)) if moved)
        stays = "; its bias stays, divided by the gain" if self.keeps_bias else ""
        return f"{self.name}: {what} of the {self.kind} into {', '.join(self.into)}{stays}"

    def without_gain(self) -> NormFold:
        """Return the fold of the bias alone."""
        return replace(self, moves_gain=False)

    def forbidden(self, state: Mapping[str, Tensor]) -> str:
        """Return why the values of a state do not allow the gain to go; empty if they do."""
        if not self.moves_gain or self.gain is None:
            return ""
        for reader in self.readers:
            if reader.lengths is not None:
                directions = reader.weight.of(state[reader.weight.name].double().contiguous())
                factors = self.factors(lambda name: state[name].double()).flatten()[
                    reader.index.to(directions.device)
                ]
                if bool((reader.lengths.of(directions * along(directions, reader.axis, factors)) == 0).any()):
                    return f"a direction of {reader.weight.name!r}, which is normalised, would be left without a length"
        if not self.keeps_bias or self.bias is None:
            return ""
        gain, bias = (part.of(state[part.name].contiguous()).flatten() for part in (self.gain, self.bias))
        count = int(((gain + self.offset == 0) & (bias != 0)).sum())
        return f"{count} of its entries are 0 where the bias, which has to stay, is not" if count else ""

    def factors(self, look: LookUp) -> Tensor:
        """Return what the norm multiplies by."""
        assert self.gain is not None, "only asked where there is one"
        return self.gain.of(look(self.gain.name)) + self.offset

    def shifts(self, look: LookUp) -> Tensor:
        """Return what the norm adds."""
        assert self.bias is not None, "only asked where there is one"
        return self.bias.of(look(self.bias.name))

    def bias_steps(self) -> Iterable[EditStep]:
        """Yield the steps that move the bias."""
        if self.moves_bias and self.bias is not None:
            yield from self._shift_readers(self.shifts)
            yield Filled(self.bias.name, self.bias, 0.0)

    def gain_steps(self) -> Iterable[EditStep]:
        """Yield the steps that move the gain."""
        if not self.moves_gain or self.gain is None:
            return
        for reader in self.scaled:
            yield from _scaled(reader, self.factors)
        if self.keeps_bias and self.bias is not None:
            yield MapPart(self.bias.name, self.bias, self._divided)
        yield Filled(self.gain.name, self.gain, 1.0 - self.offset)

    def inverse_gain_steps(self, original: Mapping[str, Tensor]) -> Iterable[EditStep]:
        """Yield the steps that put the gain back, in front of whatever the state has in its place by now.

        Args:
            original: the norm's tensors as they were.

        Raises:
            SymmetryError: the gain had a zero.
        """
        if not self.moves_gain or self.gain is None:
            return
        gain = self.gain.of(original[self.gain.name].double().contiguous()) + self.offset
        if not bool((gain != 0).all()):
            raise SymmetryError(
                f"Cannot unfold {self.name!r}: {int((gain == 0).sum())} entries of its gain were 0, so what its "
                "readers had there is gone. Keep the state as it was before folding."
            )
        for reader in self.scaled:
            yield from _scaled(reader, lambda _: 1 / gain)
        if self.bias is not None:
            yield MapPart(self.bias.name, self.bias, lambda own, _: own * gain.reshape(own.shape).to(own))
        yield MapPart(
            self.gain.name,
            self.gain,
            lambda own, _: (own + self.offset) * gain.reshape(own.shape).to(own) - self.offset,
        )

    def inverse_bias_steps(self, original: Mapping[str, Tensor]) -> Iterable[EditStep]:
        """Yield the steps that put the bias back, beside whatever the state has in its place by now."""
        if self.moves_bias and self.bias is not None:
            bias = self.bias.of(original[self.bias.name].double().contiguous())
            yield from self._shift_readers(lambda _: -bias)
            yield MapPart(self.bias.name, self.bias, lambda own, _: own + bias.reshape(own.shape).to(own))

    def _divided(self, own: Tensor, look: LookUp) -> Tensor:
        gain = self.factors(look).reshape(own.shape).to(own)
        return torch.where(gain == 0, own, own / gain)

    def _shift_readers(self, constants: Any) -> Iterable[EditStep]:
        done: set[tuple[str, tuple[Any, ...]]] = set()
        for reader in self.readers:
            assert reader.bias is not None, "the plan moves a bias into biases"
            place = (reader.bias.name, tuple(step.name for step in reader.bias.steps))
            if place not in done:
                done.add(place)
                yield Shifted(
                    reader.bias.name,
                    reader.bias,
                    reader.matrix,
                    reader.axis,
                    reader.index,
                    constants,
                    reader.bias_axes,
                )


def _scaled(reader: Reader, factors: Callable[[LookUp], Tensor]) -> Iterable[EditStep]:
    """Yield the steps that multiply a reader by a factor for every channel."""
    lengths = reader.lengths
    if lengths is not None:
        # W = g v / |v|: the directions are multiplied, and the lengths make up for how much longer they are
        def longer(own: Tensor, look: LookUp) -> Tensor:
            before = reader.weight.of(look(reader.weight.name))
            after = before * along(before, reader.axis, factors(look).flatten().to(before)[reader.index])
            return own * (lengths.of(after) / lengths.of(before)).reshape(own.shape)

        yield MapPart(lengths.part.name, lengths.part, longer)
    yield Scaled(reader.weight.name, reader.weight, reader.axis, reader.index, factors)


def find_norm_folds(uses: TensorUses, *, gains: bool, biases: bool) -> tuple[list[NormFold], list[Refusal]]:
    """Return the norms whose gain or bias can go into their readers, and what stays.

    Args:
        uses: of the tensors.
        gains: whether gains are looked at.
        biases: whether biases are.
    """
    groups: dict[Any, list[Norm]] = {}
    for way in uses.ways:
        for norm in norms_of(way):
            if norm.gain is not None or norm.bias is not None or norm.problem:
                groups.setdefault(_identity(uses, norm), []).append(norm)
    folds, refusals = list[NormFold](), list[Refusal]()
    for norms in groups.values():
        fold, refused = _NormPlaces(uses, norms).fold(gains=gains, biases=biases)
        folds += [fold] if fold is not None and fold.moves else []
        refusals += refused
    return folds, refusals


def _identity(uses: TensorUses, norm: Norm) -> Any:
    part = norm.gain if norm.gain is not None else norm.bias
    return norm.name if part is None else (part.name, uses.key(part))


class _NormPlaces:
    """The places where one norm is computed, in all ways through the code."""

    def __init__(self, uses: TensorUses, norms: list[Norm]) -> None:
        self.uses, self.norms, self.first = uses, norms, norms[0]
        self.name = " and ".join(dict.fromkeys(norm.name for norm in norms))
        self.readers: list[Reader] = []

    def fold(self, *, gains: bool, biases: bool) -> tuple[NormFold | None, list[Refusal]]:
        """Return the fold, and what stays."""
        why = self._problem()
        if not why:
            try:
                self.readers = [r for n in self.norms for r in readers_of(n.way, n.node, n.axis)]
            except NotLinear as found:
                why = str(found)
        gain, bias = self.first.gain, self.first.bias
        if why:
            wanted = ((gain, gains, "gain"), (bias, biases, "bias"))
            return None, [
                Refusal(self.name, w, why) for part, asked, w in wanted if part is not None and asked
            ]
        refused = list[Refusal]()
        moves = {"gain": gains and gain is not None, "bias": biases and bias is not None}
        for what, check in (("gain", self._gain_problem), ("bias", self._bias_problem)):
            problem = check() if moves[what] else None
            if problem is not None:
                moves[what] = False
                lacking = {r.weight.name: None for r in self.readers if r.bias is None and what == "bias"}
                refused.append(
                    Refusal(self.name, what, problem.text, problem.tied, problem.apart, tuple(lacking))
                )
        weights = {(r.weight.name, self.uses.key(r.weight)): r for r in self.readers}
        pairs = {(r.weight.name, self.uses.key(r.weight), r.bias and r.bias.name): r for r in self.readers}
        fold = NormFold(
            self.name,
            self.first.kind,
            gain,
            bias,
            self.first.offset,
            tuple(pairs.values()),
            tuple(weights.values()),
            moves["gain"],
            moves["bias"],
        )
        return fold, refused

    def _problem(self) -> str:
        """Return why the norm's own tensors cannot change."""
        first = self.first
        for norm in self.norms:
            if norm.problem:
                return norm.problem
            same = all(
                (own is None) == (other is None)
                and (
                    own is None
                    or other is None
                    or (own.name, self.uses.key(own)) == (other.name, self.uses.key(other))
                )
                for own, other in ((norm.gain, first.gain), (norm.bias, first.bias))
            )
            if not same or norm.offset != first.offset:
                return "it is used with other tensors elsewhere"
        for word in ("gain", "bias"):
            part: StatePart | None = getattr(first, word)
            if part is None:
                continue
            users = {getattr(norm, f"{word}_user") for norm in self.norms}
            claimed = {use for use, _ in self.uses.of(part.name) if use.user in users}
            problem = self.uses.problem(part, claimed, "this norm")
            if problem is not None:
                return problem.text
        return ""

    def _gain_problem(self) -> Obstacle | None:
        for reader in self.readers:
            alike = [r for r in self.readers if self._same_weight(r, reader)]
            claimed = claims(r.weight_use for r in alike)
            problem = self.uses.problem(reader.weight, claimed, f"a reader of {self.name!r}")
            if problem is None and reader.lengths is not None:
                claimed = claims(
                    (r.lengths.node, r.lengths.operands[1]) for r in alike if r.lengths is not None
                )
                problem = self.uses.problem(reader.lengths.part, claimed, f"a reader of {self.name!r}")
            if problem is not None:
                return problem
        return None

    def _bias_problem(self) -> Obstacle | None:
        for reader in self.readers:
            if reader.bias is None:
                return Obstacle(f"its reader {reader.weight.name!r} has no bias of its own in the state")
            if not reader.constant:
                return Obstacle(
                    f"its reader {reader.weight.name!r} does not meet it as a constant (padding, or factors)"
                )
            alike = [
                r
                for r in self.readers
                if r.bias is not None and r.bias_axes == reader.bias_axes and self._same_weight(r, reader)
            ]
            claimed = claims((r.bias_user, r.bias_operand) for r in alike)
            problem = self.uses.problem(reader.bias, claimed, f"the bias of a reader of {self.name!r}")
            if problem is not None:
                return problem
        return None

    def _same_weight(self, one: Reader, other: Reader) -> bool:
        """Whether two readers multiply the same channels by the same entries."""
        return (
            one.weight.name == other.weight.name
            and self.uses.key(one.weight) == self.uses.key(other.weight)
            and one.axis == other.axis
            and (one.lengths and one.lengths.part.name) == (other.lengths and other.lengths.part.name)
            and torch.equal(one.index, other.index)
            and one.product.groups == other.product.groups
        )
