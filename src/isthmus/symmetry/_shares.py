"""Which share of a network's entries moves, and what holds the others."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from isthmus.symmetry._slots import PinnedAxis
    from isthmus.symmetry._spec import SymmetrySpec

__all__ = ["fraction_moved", "outputs_note", "pinned_shares", "pinned_summary"]

_OUTPUT = "the model's output "
_MOST_CAUSES = 3


def fraction_moved(spec: SymmetrySpec) -> float:
    """Return the share of all parameter and buffer entries that some group moves, between 0 and 1."""
    total = _entries(spec)
    staying = sum(_staying(moved) * math.prod(spec.shapes[t]) for t, moved in _moved_by_axis(spec).items())
    return 1 - staying / total if total else 0.0


def pinned_shares(spec: SymmetrySpec) -> dict[str, float]:
    """Return, for everything that holds entries in their places, the share of all entries it holds, largest first.

    An entry that stays may be held along several axes by different causes and counts for each, so the shares can
    add up to more than what stays.
    """
    total, moved = _entries(spec), _moved_by_axis(spec)
    free: dict[tuple[str, str], float] = {}
    for pinned in spec.pinned:
        staying, axes = moved[pinned.tensor], len(spec.shapes[pinned.tensor])
        kept = 1 - staying.get(pinned.axis, 0.0)
        if axes and kept > 0:
            length = spec.shapes[pinned.tensor][pinned.axis]
            key = (_cause(pinned), pinned.tensor)
            free[key] = free.get(key, 1.0) * (1 - min(pinned.size / length / kept, 1.0))
    shares: dict[str, float] = {}
    for (cause, tensor), missed in free.items():
        held = (1 - missed) * _staying(moved[tensor]) * math.prod(spec.shapes[tensor])
        shares[cause] = shares.get(cause, 0.0) + held / total
    return {c: s for c, s in sorted(shares.items(), key=lambda item: -item[1]) if s > 0}


def pinned_summary(spec: SymmetrySpec) -> str:
    """Return one sentence: which share of the entries stays, and what holds most of them."""
    total, staying = _entries(spec), 1 - fraction_moved(spec)
    if total == 0:
        return "The network has no entries."
    if staying * total < 0.5:  # less than one entry: rounding
        return f"All {total:,} entries move."
    shares = pinned_shares(spec)
    causes = [f"{_percent(share)} by {cause}" for cause, share in shares.items()]
    listed = ", ".join(causes[:_MOST_CAUSES])
    others = len(causes) - _MOST_CAUSES
    more = f" and {others} other cause{'s' if others > 1 else ''}" if others > 0 else ""
    text = f"{_percent(staying)} of {total:,} entries are pinned" + (f": {listed}{more}" if causes else "")
    return f"{text[0].upper()}{text[1:]}. {outputs_note(spec)}".strip()


def outputs_note(spec: SymmetrySpec) -> str:
    """Return what could be gained by preserving fewer outputs, if all are preserved and there are several.

    An entry moves already if one of its axes does, so what stays says little of a wide layer whose units an output
    holds; the entries that lie on the axes it holds do.
    """
    crossed: dict[str, dict[str, float]] = {}
    for pinned in spec.pinned:
        if pinned.reason.startswith(_OUTPUT):
            missed = crossed.setdefault(pinned.reason, {})
            share = pinned.size / spec.shapes[pinned.tensor][pinned.axis]
            missed[pinned.tensor] = missed.get(pinned.tensor, 1.0) * (1 - min(share, 1.0))
    if spec.outputs is not None or len(crossed) < 2:
        return ""
    total = _entries(spec)
    shares = {
        cause: sum((1 - m) * math.prod(spec.shapes[t]) for t, m in missed.items()) / total
        for cause, missed in crossed.items()
    }
    largest = max(shares, key=shares.__getitem__)
    return (
        f"{_percent(shares[largest])} of the entries lie on an axis that {largest} holds: say with outputs=... "
        f"(--outputs) which of the {len(shares)} outputs must be preserved."
    )


def _cause(pinned: PinnedAxis) -> str:
    return f"{pinned.operator} ({pinned.reason})" if pinned.operator else pinned.reason


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %" if share >= 0.01 else "less than 1 %"


def _entries(spec: SymmetrySpec) -> int:
    return sum(math.prod(s) for s in spec.shapes.values())


def _staying(moved: Mapping[int, float]) -> float:
    return math.prod(1 - share for share in moved.values())


def _moved_by_axis(spec: SymmetrySpec) -> dict[str, dict[int, float]]:
    """Return the share of positions that move, for every axis of every tensor on which something moves."""
    moved: dict[str, dict[int, float]] = {tensor: {} for tensor in spec.shapes}
    for tensor, by_axis in spec.slots_by_tensor().items():
        for axis, slots in by_axis.items():
            touched = torch.zeros(spec.shapes[tensor][axis], dtype=torch.float64)
            for _, slot in slots:
                share = math.prod(index.covered / index.length for _, index in slot.block)
                touched[slot.index.positions().reshape(-1)] += share
            moved[tensor][axis] = float(touched.clamp(max=1).mean())
    return moved
