"""What the commands print for people: a few lines, and every group and every pinned axis only when asked."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from isthmus.matching import Alignment
from isthmus.symmetry import Acts, AxisGroup, SymmetrySpec

__all__ = ["alignment_text", "larger_hint", "larger_moves", "spec_text", "told_groups"]

_LINES = 24
"""A table of groups up to this length is printed whole."""
_NOTES = 3


def spec_text(spec: SymmetrySpec, verbose: bool = False) -> str:
    """Return the groups of a spec and what is pinned, alike ones together unless all are asked for."""
    whole = str(spec)
    if verbose or whole.count("\n") < _LINES:
        return whole
    headline = whole.partition("\n\n")[0]
    every = spec.with_planes().groups
    lines = [headline, "", *_alike((name, _described(group, spec)) for name, group in every.items())]
    if spec.pinned:
        reasons = Counter[str]()
        for axis in spec.pinned:
            reasons[f"{axis.reason}{f' [{axis.operator}]' if axis.operator else ''}"] += 1
        lines += ["", "pinned"]
        lines += [f"  {count} axes: {reason}" for reason, count in reasons.most_common(_LINES // 3)]
        if len(reasons) > _LINES // 3:
            lines.append(f"  and axes for {len(reasons) - _LINES // 3} more reasons")
    if spec.experiments:
        lines += ["", f"operators without a rule, tried by experiment: {', '.join(spec.experiments)}"]
    return "\n".join([*lines, "", "--verbose lists every group and every pinned axis."])


def _described(group: AxisGroup, spec: SymmetrySpec) -> str:
    """Return how many units a group has, what may act on them, and which operators prevent more."""
    limits = (
        f"{limit.acts.words}, were it not for {limit.operator.removeprefix('aten.')}"
        for limit in group.limits
    )
    more = "; ".join(dict.fromkeys(limits))
    acts = f", {group.acts.words}" if spec.with_planes().larger else ""
    return f"{group.size} units{acts}{f' ({more})' if more else ''}"


def alignment_text(alignment: Alignment, verbose: bool = False) -> str:
    """Return what was found in a few lines: units moved, what can move, distance before and after."""
    units = {name: alignment.spec.groups[name].size for name in alignment.couplings}
    lines = [str(alignment)]
    before, after = (_mean(alignment.costs, units, end) for end in (0, 1))
    if before is not None and after is not None:
        lines.append(
            f"Mean squared distance per unit in this metric: {before:.4g} before, {after:.4g} after."
        )
    lines += _moves(alignment) if verbose else larger_moves(alignment)
    notes = [note for note in alignment.notes if note not in lines[0]]
    shown = notes if verbose else notes[:_NOTES]
    lines += [f"Note: {note}" for note in shown]
    if len(shown) < len(notes):
        lines.append(f"{len(notes) - len(shown)} more notes with --verbose.")
    return "\n".join(lines)


def _moves(alignment: Alignment) -> list[str]:
    """Return a line for each group."""
    width = max((len(g) for g in alignment.couplings), default=5)
    return [f"  {group:<{width}}  {_move(alignment, group)}" for group in alignment.couplings]


def larger_moves(alignment: Alignment) -> list[str]:
    """Return lines on the groups that move by more than permutations, alike ones together where they are many."""
    summaries, larger = alignment.summaries, alignment.larger
    if len(larger) <= _LINES // 2:
        width = max((len(g) for g in larger), default=5)
        return [f"  {group:<{width}}  {alignment.describe(group)}" for group in larger]
    kinds = {
        name: f"{summaries[name].units} {'dimensions' if summaries[name].mixes else 'units'}, "
        f"{summaries[name].kind}"
        for name in larger
    }
    return _alike(kinds.items())


def _move(alignment: Alignment, group: str) -> str:
    if group not in alignment.costs:
        return alignment.describe(group)
    old, new = alignment.costs[group]
    return f"{alignment.describe(group)}, matched cost {old:.4g} → {new:.4g}"


def told_groups(alignment: Alignment) -> dict[str, Any]:
    """Return what happens to each group, for machines: its class, kind, numbers, similarity, and all of it in words."""
    return {
        name: {
            "acts": str(alignment.spec.groups[name].acts),
            **summary.to_dict(),
            "similarity": list(alignment.similarities[name]) if name in alignment.similarities else None,
            "text": alignment.describe(name),
        }
        for name, summary in alignment.summaries.items()
    }


def larger_hint(classes: Sequence[str]) -> str:
    """Return one line on what a network allows beside permutations; empty where that is nothing.

    Args:
        classes: of all its groups, in words.
    """
    counts = Counter(words for words in classes if words != Acts.PERMUTATION.words)
    if not counts:
        return ""
    allowed = ", ".join(f"{words} in {count}" for words, count in counts.most_common())
    groups = f"{len(classes)} group{'' if len(classes) == 1 else 's'}"
    return f"Of {groups} this network allows more than permutations: {allowed}; --symmetry all uses them."


def _mean(costs: Mapping[str, tuple[float, float]], units: Mapping[str, int], end: int) -> float | None:
    """Return the mean over all units of the cost before (0) or after (1), or None where none was measured."""
    total = sum(units[group] for group in costs)
    return sum(units[group] * cost[end] for group, cost in costs.items()) / total if total else None


def _alike(groups: Iterable[tuple[str, str]]) -> list[str]:
    """Return a line for all groups of one size whose names differ in numbers only."""
    patterns: defaultdict[tuple[str, str], list[str]] = defaultdict(list)
    for name, size in groups:
        patterns[re.sub(r"\d+", "*", name), size].append(name)
    shown = [
        (names[0] if len(names) == 1 else pattern, len(names), size)
        for (pattern, size), names in patterns.items()
    ]
    width = max(len(name) for name, _, _ in shown)
    return [
        f"  {name:<{width}}  {f'{count} groups of ' if count > 1 else ''}{size}"
        for name, count, size in shown
    ]
