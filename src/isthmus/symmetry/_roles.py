"""Whether a tensor holds, reads or scales the units on each of its axes.

A layer :math:`W h + b` *holds* its outputs on the axis of ``W`` that it keeps, and *reads* its inputs on the axis that
it sums over; ``b`` and tables hold. A gain that multiplies units one by one *scales* them: a factor on a unit passes
through it. How tensors are used is found in :mod:`isthmus.symmetry._uses`; here the uses of each slot are put together.
"""

from __future__ import annotations

from dataclasses import replace

from isthmus.symmetry._origins import Along, Multiplied, Uses, Word, Words
from isthmus.symmetry._slots import Role, Slot
from isthmus.symmetry._spec import SymmetrySpec
from isthmus.symmetry._trace import Trace
from isthmus.symmetry._uses import find_uses

__all__ = ["with_roles"]

_ROLE_OF: dict[frozenset[Word], Role] = {
    frozenset({"holds"}): "holds",
    frozenset({"reads"}): "reads",
    frozenset({"holds", "reads"}): "both",
    frozenset({"scales"}): "scales",
}
"""What the uses of a slot amount to; anything else, an unknown use among them, leaves the role empty."""
_OPPOSITE: dict[Word, Word] = {"holds": "reads", "reads": "holds"}


def with_roles(spec: SymmetrySpec, traced: Trace) -> SymmetrySpec:
    """Return a spec whose slots say whether they hold, read or scale their units.

    Args:
        spec: as discovered.
        traced: the network.
    """
    uses = Uses()
    for way in (traced, *traced.others):
        find_uses(way, uses)
    _orient(uses)

    def role(slot: Slot) -> Role:
        words = uses.words.get((traced.first_name(slot.tensor), slot.axis), {})
        low, high = slot.index.stride, slot.index.stride * slot.index.size
        return _ROLE_OF.get(_between(words, low, high), "")

    groups = {
        name: replace(group, slots=tuple(replace(slot, role=role(slot)) for slot in group.slots))
        for name, group in spec.groups.items()
    }
    return replace(spec, groups=groups)


def _between(words: Words, low: int, high: int) -> frozenset[Word]:
    """Return the words said of steps from ``low`` to ``high``."""
    return frozenset(word for begin, end, word in words if max(begin, low) < min(end, high))


def _orient(uses: Uses) -> None:
    """Say of products of two tensors of the state, ``B A``, which factor holds the units between them.

    Any choice is right as long as a group makes it once: what is known of one factor decides, else the right one holds.
    """
    waiting = list(uses.products)
    while waiting:
        known = [product for product in waiting if _known(product, uses)]
        for product in known or waiting[:1]:
            waiting.remove(product)
            words = _known(product, uses) or {("reads", "holds")}
            for pair in words:
                for side, word in zip(product, pair, strict=True):
                    for along in side:
                        uses.say(along, word)


def _known(product: Multiplied, uses: Uses) -> set[tuple[Word, Word]]:
    """Return the words that what is known of either factor gives both."""
    found: set[tuple[Word, Word]] = set()
    for turned, side in enumerate(product):
        for along in side:
            for word in _words_of(along, uses) & _OPPOSITE.keys():
                pair = (word, _OPPOSITE[word])
                found.add(pair if not turned else (pair[1], pair[0]))
    return found


def _words_of(along: Along, uses: Uses) -> frozenset[Word]:
    words = uses.words.get((along.tensor, along.axis), {})
    return _between(words, along.step, along.step * along.number)
