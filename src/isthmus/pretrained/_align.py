"""Weight matching of stored networks: a few tensors of both in memory, never the networks."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from isthmus.couplings import index_of
from isthmus.layers import find_sites, tensors_met
from isthmus.matching import (
    Alignment,
    Cluster,
    Comparison,
    CoordinateDescent,
    Facet,
    Gain,
    Schedule,
    SinglePass,
    Structure,
    Term,
    assignment_solver,
)
from isthmus.matching._align import OnStage, _costs, silent
from isthmus.matching._layers import Layers
from isthmus.matching._objectives import _added as added
from isthmus.pretrained._lazy import LazyState
from isthmus.pretrained._open import OpenedModel
from isthmus.pretrained._verify import function_change, verify
from isthmus.states import check_finite, check_same_architecture, digest_of
from isthmus.symmetry import Couplings, Reordering, SymmetrySpec, reordering

__all__ = ["StoredWeights", "align"]

_log = logging.getLogger(__name__)
_PIECE = 2**23
"""Entries of a tensor that are worked on at a time: 64 MiB in float64."""


def align(
    model_a: OpenedModel,
    model_b: OpenedModel,
    *,
    spec: SymmetrySpec | None = None,
    outputs: Any = None,
    schedule: Schedule | None = None,
    check: bool = True,
    seed: int = 0,
    on_stage: OnStage | None = None,
) -> Alignment:
    """Find the relabelling of B that brings its weights close to A's, reading tensors as they are needed.

    The method is ``"weights"`` of :func:`isthmus.align`, with the same objective and schedule; tensors are read
    group by group. Other methods compare activations and run the networks: use ``isthmus.align(a.load(),
    b.load(), ...)``.

    Args:
        model_a: network A.
        model_b: network B, which moves towards A.
        spec: the symmetries; default: discovered (see :meth:`OpenedModel.discover`).
        outputs: outputs that must be preserved, for the discovery.
        schedule: order of matching; default: a single pass, then coordinate descent until nothing improves.
        check: verify the spec before using it, and measure how far the result changes B's outputs.
        seed: of the verification, and of random orders.
        on_stage: told what begins, and how many of how many steps are done.

    Raises:
        CheckpointError: other architectures, or NaN or infinite weights.
        ShapeError: other sizes.
        VerificationError: the spec changes the function of A.
        ModelError: the network cannot be traced or run.

    Source:
        Ainsworth, Hayase and Srinivasa 2023, section 3.2.
    """
    check_same_architecture(
        model_a.state.shapes(), model_b.state.shapes(), str(model_a.path), str(model_b.path)
    )
    tell = on_stage or silent
    tell("discovering symmetries", 0, 4)
    spec = model_a.discover(outputs) if spec is None else spec
    parameters = tuple(name for name, _ in model_a.model.named_parameters())
    layers = Layers(spec, find_sites(model_a.traced), parameters, tensors_met(model_a.traced))
    objective = StoredWeights(layers, model_a.state, model_b.state)
    objective.check_finite(str(model_a.path), str(model_b.path))
    if check:
        tell("verifying by running", 1, 4)
        verify(spec, model_a, seed=seed).require()
    tell("matching by weights", 2, 4)
    generator = torch.Generator().manual_seed(seed)
    if schedule is not None:
        match = schedule.run(objective, assignment_solver, None, generator)
    else:
        first = SinglePass().run(objective, assignment_solver, None, generator)
        match = CoordinateDescent().run(objective, assignment_solver, first.couplings, generator)
    permutations = {name: match.permutations[name] for name in spec.groups}
    tell("measuring how far outputs change", 3, 4)
    return Alignment(
        permutations=permutations,
        spec=spec,
        method="weights",
        sweeps=match.sweeps,
        status=match.status,
        costs=_costs(objective, permutations),
        notes=spec.notes,
        settings={"schedule": "default" if schedule is None else repr(schedule), "check": check},
        seed=seed,
        verification_error=function_change(spec, permutations, model_b) if check else None,
        digest_a=digest_of(model_a.state),
        digest_b=digest_of(model_b.state),
    )


class StoredWeights:
    """The objective of full weight matching, of two states whose tensors are read one at a time.

    The same sums as :func:`isthmus.matching.align` forms for ``"weights"``, in float64, over pieces of tensors.

    Args:
        layers: the groups, and where they act.
        a: state of A.
        b: state of B.
    """

    def __init__(self, layers: Layers, a: LazyState, b: LazyState) -> None:
        self._layers, self._a, self._b = layers, a, b
        self._facets = {n: facets for n in layers.parameters if (facets := layers.facets(n))}
        self._groups = {
            n: frozenset(g for pairs in layers.table[n].values() for g, _ in pairs) for n in self._facets
        }
        self._norms: dict[str, float] = {}
        self._inner: dict[tuple[str, bytes], float] = {}

    @property
    def structure(self) -> Structure:
        """The groups, those that are matched together, and their order."""
        return self._layers.structure

    def gains(self, cluster: Cluster, at: Couplings, *, all_terms: bool = True) -> Sequence[Gain]:
        """Return the gains of a cluster (see :class:`isthmus.matching.Objective`)."""
        facets = [(n, f) for n in self._moved_by(cluster) for f in self._facets[n] if f.cluster == cluster]
        needed = list(cluster)
        if not all_terms:
            needed = [name for name in cluster if name not in at]
            known = [(n, f) for n, f in facets if all(g in at for g in self._groups[n] - f.groups)]
            if any(f.groups.intersection(needed) for _, f in known):
                facets, needed = known, []
        _log.info("matching %s: %d facets", ", ".join(cluster), len(facets))
        found: list[Gain] = []
        for name, facet in facets:
            for piece in self._pieces_along(name, facet, at):
                found = added([*found, *piece])
        return found + [self._nothing(g) for g in needed if not any(g in gain.members for gain in found)]

    def _nothing(self, group: str) -> Gain:
        """Return the gain of a group that moves no parameter."""
        size = self.structure.sizes[group]
        return Gain(torch.zeros(size, size, dtype=torch.float64), {group: torch.arange(size)[:, None]})

    def value(self, at: Couplings, groups: Iterable[str] | None = None) -> float:
        """Return the inner product of A's tensors with the relabelled ones of B (maximised)."""
        names = list(self._facets) if groups is None else self._moved_by(groups)
        return sum(self._product(name, at) for name in names)

    def cost(self, group: str, at: Couplings) -> float:
        """Return the squared distance per unit over the tensors of the group's cluster."""
        names = self._moved_by(self.structure.cluster_of[group])
        total = sum(self._norm(name) - 2 * self._product(name, at) for name in names)
        return total / max(self.structure.sizes[group], 1)

    def _moved_by(self, groups: Iterable[str]) -> list[str]:
        wanted = frozenset(groups)
        return [name for name in self._facets if wanted & self._groups[name]]

    def _pieces_along(self, name: str, facet: Facet, at: Couplings) -> Iterator[list[Gain]]:
        """Yield the gains of one tensor along a facet, piece by piece."""
        a, b, gather = self._a[name], self._b[name], self._gather(name, at)
        cut = None if gather.parts else _longest_axis(a.shape, facet.axes)
        for piece_a, piece_b in _pieces(a, b, cut, gather):
            comparison = Comparison((piece_a,), (piece_b,), ({},), 0.0)
            yield Term(facet, comparison, (facet.axes,)).gains({})

    def _gather(self, name: str, at: Couplings) -> Reordering:
        return reordering(self._layers.table[name], at)

    def _product(self, name: str, at: Couplings) -> float:
        """Return the inner product of one tensor; remembered, as most groups move between two questions."""
        digest = hashlib.blake2b()
        for group in sorted(self._groups[name]):
            if group in at:
                digest.update(group.encode() + index_of(at[group]).numpy().tobytes())
        key = (name, digest.digest())
        if key not in self._inner:
            self._inner[key] = _product(self._a[name], self._b[name], self._gather(name, at))
        return self._inner[key]

    def check_finite(self, name_a: str, name_b: str) -> None:
        """Check all tensors that a group moves, and remember the sums of their squares.

        Raises:
            CheckpointError: an entry is NaN or infinite.
        """
        for name in self._facets:
            self._norms[name] = 0.0
            for state, title in ((self._a, name_a), (self._b, name_b)):
                tensor = state[name]
                check_finite({name: tensor}, title)
                self._norms[name] += _squares(tensor)

    def _norm(self, name: str) -> float:
        if name not in self._norms:
            self._norms[name] = sum(_squares(state[name]) for state in (self._a, self._b))
        return self._norms[name]


def _longest_axis(shape: Sequence[int], without: Sequence[int] = ()) -> int | None:
    """Return the axis along which a tensor is best cut into pieces, ``None`` if there is no other."""
    axes = [k for k in range(len(shape)) if k not in without]
    return max(axes, key=lambda k: shape[k], default=None)


def _pieces(a: Tensor, b: Tensor, cut: int | None, gather: Reordering) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield pieces of two tensors in float64, cut along an axis; B is put in order first."""
    if cut is None:
        yield a.double(), gather.apply(b).double()
        return
    order = gather.axes.get(cut)
    rest = gather.without(cut)
    length = a.shape[cut]
    step = max(1, _PIECE * length // max(a.numel(), 1))
    for start in range(0, length, step):
        count = min(step, length - start)
        own = slice(start, start + count)
        part = b.narrow(cut, start, count) if order is None else b.index_select(cut, order[own])
        yield a.narrow(cut, start, count).double(), rest.apply(part).double()


def _product(a: Tensor, b: Tensor, gather: Reordering) -> float:
    """Return the inner product of a tensor with another put in order."""
    cut = None if gather.parts else _longest_axis(a.shape)
    return sum(float((x * y).sum()) for x, y in _pieces(a, b, cut, gather))


def _squares(tensor: Tensor) -> float:
    return sum(float(part.double().square().sum()) for part in tensor.reshape(-1).split(_PIECE))
