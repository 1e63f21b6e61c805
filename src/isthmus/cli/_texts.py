"""What the commands print for people: a few lines, and every group and every pinned axis only when asked."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping

from isthmus.matching import Alignment
from isthmus.symmetry import AxisGroup, SymmetrySpec

__all__ = ["alignment_text", "spec_text"]

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
    if verbose:
        width = max((len(g) for g in alignment.couplings), default=5)
        for group, (old, new) in alignment.costs.items():
            moved = alignment.moved[group]
            lines.append(f"  {group:<{width}}  {moved:6.1%} moved, matched cost {old:.4g} → {new:.4g}")
    notes = [note for note in alignment.notes if note not in lines[0]]
    shown = notes if verbose else notes[:_NOTES]
    lines += [f"Note: {note}" for note in shown]
    if len(shown) < len(notes):
        lines.append(f"{len(notes) - len(shown)} more notes with --verbose.")
    return "\n".join(lines)


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
