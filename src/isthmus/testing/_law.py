"""The law that ties gains to values, as a check that third-party objectives can run too."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from isthmus.couplings import Rotation, random_permutation
from isthmus.matching import Cluster, InnerProduct, MomentObjective, Objective
from isthmus.symmetry import Couplings, Slot, carry_tensor

__all__ = ["check_gain_law"]

_TOLERANCE = 1e-9


class _Compares(Protocol):
    @property
    def compared(self) -> Sequence[InnerProduct]: ...


def check_gain_law(objective: Objective, *, seed: int = 0) -> None:
    r"""Check that gains are the gradient of what the objective compares.

    At random permutations of all groups, for every cluster and every group in it: let a matrix :math:`M` act on the
    units of B, once the permutations have moved them, through the slots that each inner product counts
    (:meth:`isthmus.matching.InnerProduct.counted`). Then

    .. math:: \frac{\partial}{\partial M} \sum \langle a, M b \rangle \Big|_{M = 1}
              = \sum_{\text{gains}} \text{gain.reduced(group)}.

    Where activations are compared, the value is :math:`\langle G, M \rangle` itself: moving a group further changes it
    by the gains of the pairs that are made minus those of the pairs that are parted.

    Terms with a scale (``tie_outgoing``) are approximations outside the law: objectives that have them do not pass.

    Args:
        objective: one with ``compared``, such as :class:`isthmus.matching.TermObjective`, or a
            :class:`isthmus.matching.MomentObjective`.
        seed: of the permutations.

    Raises:
        AssertionError: naming the group whose gains are something else, or what the objective lacks.
    """
    structure = objective.structure
    generator = torch.Generator().manual_seed(seed)
    at = {name: random_permutation(size, generator) for name, size in structure.sizes.items()}
    for cluster in structure.clusters:
        for group in cluster:
            size = structure.sizes[group]
            gains = [g.reduced(group).cpu() for g in objective.gains(cluster, at) if group in g.members]
            found = sum(gains, torch.zeros(size, size, dtype=torch.float64))
            if isinstance(objective, MomentObjective) and cluster in objective.seen:
                _check_moments(objective, cluster, group, at, found, random_permutation(size, generator))
            else:
                part = objective.fallback if isinstance(objective, MomentObjective) else objective
                expected = sum(
                    (_gradient(c, group, size, at) for c in _compared(part) if group in c.groups),
                    torch.zeros(size, size, dtype=torch.float64),
                )
                _require_close(group, found, expected)


def _compared(objective: object) -> Sequence[InnerProduct]:
    compares: _Compares | None = objective if hasattr(objective, "compared") else None  # pyright: ignore
    if compares is None:
        raise AssertionError(
            f"gain law: expected an objective that lists what it compares (compared), found {objective!r}."
        )
    return compares.compared


def _require_close(group: str, found: Tensor, expected: Tensor) -> None:
    error, scale = float((found - expected).abs().max()), float(expected.abs().max())
    if not error <= _TOLERANCE * max(scale, 1.0):
        raise AssertionError(
            f"gain law: the gains of {group!r} differ from the gradient of what is compared by {error:.2g}, whose "
            f"largest entry is {scale:.2g}."
        )


def _gradient(inner_product: InnerProduct, group: str, size: int, at: Couplings) -> Tensor:
    """Return the gradient of an inner product by a matrix that acts on one group's units of B."""
    matrix = torch.eye(size, dtype=torch.float64, requires_grad=True)
    total = torch.zeros((), dtype=torch.float64)
    for a, b, slots in zip(
        inner_product.a, inner_product.moved(at), inner_product.counted(group), strict=True
    ):
        for slot in slots:
            b = _acted(b, slot, group, matrix)
        values = a if isinstance(a, Tensor) else a.read()
        total = total + (values.double() * b).sum().cpu()
    if not total.requires_grad:
        return torch.zeros_like(matrix)
    return torch.autograd.grad(total, matrix)[0]


def _acted(tensor: Tensor, slot: Slot, group: str, matrix: Tensor) -> Tensor:
    """Return a tensor on whose slot a matrix acts: as a rotation would, whatever it is to the units."""
    slots = {slot.axis: [(group, replace(slot, role="", power=None))]}
    return carry_tensor(tensor, slots, {group: Rotation(matrix)})


def _check_moments(
    objective: MomentObjective, cluster: Cluster, group: str, at: Couplings, gain: Tensor, step: Tensor
) -> None:
    structure = objective.structure
    after = structure.followed(at, cluster, {group: step})
    rise = objective.seen_value(after) - objective.seen_value(at)
    units = torch.arange(len(step))
    expected = float(gain[units, step].sum() - gain.trace())
    scale = max(float(gain.abs().sum()), 1.0)
    if not abs(rise - expected) <= _TOLERANCE * scale:
        raise AssertionError(
            f"gain law: moving {group!r} changes the value by {rise:.6g}, its gains say {expected:.6g}."
        )
