"""How alike the weights of a group are before and after it moves: what is said of couplings that no unit shows."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from isthmus.couplings import Coupling, Permutation
from isthmus.symmetry import AxisGroup, Relabelling, Slot, SymmetrySpec

__all__ = ["weight_similarities"]


def weight_similarities(
    spec: SymmetrySpec,
    couplings: Mapping[str, Coupling],
    state_a: Mapping[str, Tensor],
    state_b: Mapping[str, Tensor],
    clusters: Iterable[tuple[str, ...]],
) -> dict[str, tuple[float, float]]:
    r"""Return the cosine of A's and B's weights before and after a group moves, for what is more than a permutation.

    It is :math:`\langle a, b \rangle / \lVert a \rVert \lVert b \rVert` over all entries that the group acts on.
    Before, its whole cluster (heads with their dimensions) stays where B has it, and all other groups have moved.

    Args:
        spec: the symmetries.
        couplings: of all groups.
        state_a: of A.
        state_b: of B, as it was.
        clusters: groups that move together.

    Returns:
        By group, both cosines; groups that are permuted, or whose weights are zero, are left out.
    """
    found: dict[str, tuple[float, float]] = {}
    for cluster in clusters:
        wanted = [g for g in cluster if not isinstance(couplings[g], Permutation)]
        others = {g: c for g, c in couplings.items() if g not in cluster}
        ends = [Relabelling(spec, others), Relabelling(spec, couplings)] if wanted else []
        for name in wanted:
            before, after = (_cosine(spec.groups[name], state_a, state_b, end) for end in ends)
            if before is not None and after is not None:
                found[name] = before, after
    return found


def _cosine(
    group: AxisGroup, state_a: Mapping[str, Tensor], state_b: Mapping[str, Tensor], end: Relabelling
) -> float | None:
    inner = torch.zeros(3, dtype=torch.float64)
    for slot in group.slots:
        if not state_a[slot.tensor].is_floating_point():
            continue
        ours, theirs = (
            _part(slot, values.double())
            for values in (state_a[slot.tensor], end.tensor(slot.tensor, state_b[slot.tensor].double()))
        )
        theirs = theirs.to(ours.device)
        inner += torch.stack([(ours * theirs).sum(), ours.square().sum(), theirs.square().sum()]).cpu()
    sizes = math.sqrt(float(inner[1]) * float(inner[2]))
    return float(inner[0]) / sizes if sizes > 0 else None


def _part(slot: Slot, values: Tensor) -> Tensor:
    """Return the entries of a tensor on which a group acts by one slot."""
    for axis, index in ((slot.axis, slot.index), *slot.block):
        if not index.is_whole:
            values = values.index_select(axis, index.positions().reshape(-1).to(values.device))
    return values
