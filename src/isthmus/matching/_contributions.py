r"""Matching by what units do to the outputs: contributions, and activations weighted by sensitivities.

Outputs are projected on random vectors (:mod:`isthmus.moments`), so that averages over them are sums over all outputs.
The slope of a projected output by a unit is :math:`s_u = \partial (v^\top f)/\partial h_u`. Neither method trains,
reads a label, or depends on how other groups are matched, so one joint pass forwards and backwards and a single
assignment for each group do.

``contributions``
    The gain is :math:`\mathbb E\, c_u c_{u'} / \sqrt{\rho_u \rho_{u'}}` of contributions :math:`c_u = h_u s_u` with
    root mean square :math:`\rho_u`: the geometric mean between products of contributions, where loud units rule, and
    their cosines, where all count alike. Contributions are not centred.

``sensitivity``
    The cost of a pair is what the outputs change by, to second order, where one unit takes the other one's inputs, and
    where it takes its readers:

    .. math:: \tfrac12 (\mathbb E s_u^2 + \mathbb E s_{u'}^2)\, \mathbb E (h_u - h_{u'})^2
              + \tfrac12 (\mathbb E h_u^2 + \mathbb E h_{u'}^2)\, \mathbb E (s_u - s_{u'})^2 .

    Since weights differ by unit, no term drops out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from isthmus.matching._activations import ActivationMatching, JointMoments
from isthmus.matching._by_class import ByClass
from isthmus.matching._grids import Cluster
from isthmus.moments import CrossMoment, Frame, Tap

__all__ = ["SlopeMatching", "contribution_moment", "sensitivity_moment"]


def contribution_moment(contributions: CrossMoment) -> CrossMoment:
    """Return the moment whose covariances are the gains, and whose variances are those of a unit with itself."""
    scaled = [_root(energy) for energy in _energies(contributions)]
    inverse = [torch.where(root > 0, root, torch.inf).reciprocal() for root in scaled]
    gain = contributions.second_moment * inverse[0][:, None] * inverse[1]
    return _as_moment(contributions, gain, *(root.square() for root in scaled))


def sensitivity_moment(activations: CrossMoment, slopes: CrossMoment) -> CrossMoment:
    """Return the moment of which the cost of a pair (both variances less twice the covariance) is that of the method.

    Args:
        activations: joint moment of the units.
        slopes: joint moment of the slopes of the outputs, at the same tap.
    """
    (h_a, h_b), (s_a, s_b) = _energies(activations), _energies(slopes)
    cost = _half(s_a, s_b) * (h_a[:, None] + h_b - 2 * activations.second_moment)
    cost = cost + _half(h_a, h_b) * (s_a[:, None] + s_b - 2 * slopes.second_moment)
    own_a, own_b = 2 * h_a * s_a, 2 * h_b * s_b
    return _as_moment(activations, (own_a[:, None] + own_b - cost) / 2, own_a, own_b)


def _root(energy: Tensor) -> Tensor:
    return energy.sqrt().sqrt()


def _half(a: Tensor, b: Tensor) -> Tensor:
    return (a[:, None] + b) / 2


def _energies(moment: CrossMoment) -> tuple[Tensor, Tensor]:
    """Return mean squares of the units of A and of B."""
    return moment.variance_a + moment.mean_a.square(), moment.variance_b + moment.mean_b.square()


def _as_moment(like: CrossMoment, gain: Tensor, own_a: Tensor, own_b: Tensor) -> CrossMoment:
    count, zero_a, zero_b = like.count, torch.zeros_like(like.mean_a), torch.zeros_like(like.mean_b)
    return CrossMoment(count, zero_a, zero_b, gain * count, own_a * count, own_b * count)


@dataclass(eq=False)
class SlopeMatching(ActivationMatching):
    """Pairs the units of two networks by contributions, or by activations weighted with sensitivities.

    Units whose class is larger than permutations are matched by activations: contributions are the same whatever their
    signs and factors, and say nothing about them.

    Args:
        by: ``"contributions"`` or ``"sensitivity"``.

    The others are those of :class:`ActivationMatching`; ``correlation`` is for what is matched by activations.
    """

    by: Literal["contributions", "sensitivity"] = "contributions"

    def joint_moments(self) -> JointMoments:
        """Return the joint moments that the search begins with, and say what is matched by activations."""
        problem = self.problem
        plain = [c for c, listed in problem.seen.views.items() if listed and not self._permutes(c)]
        weighted = self.by == "sensitivity"
        problem.prepare(joint=weighted or bool(plain), of_slopes=["slopes" if weighted else "contributions"])
        found = self._derived(*self._parts())
        if plain:
            found.update({c: problem.joint_moments()[c] for c in plain})
            named = ", ".join(name for cluster in plain for name in cluster)
            self.notes += (
                f"{named}: matched by activations, since {self.by} would not tell signs, factors or rotations",
            )
        return found

    def _parts(self) -> tuple[JointMoments, ...]:
        if self.by == "contributions":
            return (dict(self.problem.joint_slopes("contributions")),)
        return dict(self.problem.joint_moments()), dict(self.problem.joint_slopes("slopes"))

    def moments_of(self, taps: dict[Cluster, list[Tap]], frame: Frame | None) -> JointMoments:
        """Return joint moments at taps under a relabelling of rows."""
        if self.by == "contributions":
            return self._derived(self.problem.slopes_of(taps, frame, "contributions"))
        return self._derived(
            self.problem.moments_of(taps, frame), self.problem.slopes_of(taps, frame, "slopes")
        )

    def _permutes(self, cluster: Cluster) -> bool:
        """Return whether a cluster is permuted and no more."""
        solver = self.solver
        return solver.permutes(cluster) if isinstance(solver, ByClass) else True

    def _derived(self, *parts: JointMoments) -> JointMoments:
        derive = contribution_moment if self.by == "contributions" else sensitivity_moment
        return {
            cluster: [derive(*moments) for moments in zip(*(part[cluster] for part in parts), strict=True)]
            for cluster in parts[0]
        }
