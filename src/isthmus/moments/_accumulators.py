r"""First and second moments of streams of vectors, as values that can be updated and merged.

Sums are centred and kept in float64. Two parts with counts :math:`n, n'`, means :math:`\mu, \mu'` and centred
scatters :math:`S, S'` combine without loss (Chan, Golub & LeVeque, 1983):

.. math:: S'' = S + S' + \frac{n n'}{n + n'} (\mu' - \mu)(\mu' - \mu)^\top

so both classes are monoids: ``merge`` is associative up to rounding and ``empty`` is neutral.

Policy for units that never vary (``constant_units``): a unit is *constant* when its standard deviation does
not exceed :data:`CONSTANT_TOLERANCE` times its root mean square, i.e. float32 rounding; dead units are the
case of value zero. Constant units are listed and their correlations are exactly zero, so that a matcher pairs
them last; no NaN arises or is replaced.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from isthmus.errors import DataError, ShapeError

__all__ = ["CONSTANT_TOLERANCE", "CrossMoment", "Moment"]

CONSTANT_TOLERANCE = 2.0**-23
"""Standard deviation, relative to the root mean square, up to which a unit is constant: float32 rounding."""


@dataclass(frozen=True, eq=False)
class Moment:
    """Count, mean and centred scatter of one stream of vectors.

    Attributes:
        count: number of samples seen.
        mean: float64, shape ``(units,)``; zero when empty.
        scatter: sum of centred outer products, float64, shape ``(units, units)``.
    """

    count: int
    mean: Tensor
    scatter: Tensor

    @classmethod
    def empty(cls, units: int, device: torch.device | str | None = None) -> Moment:
        """Return the moment of no samples of ``units`` numbers each."""
        return cls(
            0,
            torch.zeros(units, dtype=torch.float64, device=device),
            torch.zeros(units, units, dtype=torch.float64, device=device),
        )

    @property
    def units(self) -> int:
        """Length of the vectors."""
        return len(self.mean)

    def update(self, batch: Tensor) -> Moment:
        """Return the moment with the rows of ``batch``, shape ``(samples, units)``, added.

        Raises:
            ShapeError: not a matrix of ``units`` columns.
            DataError: NaN or infinite entries.
        """
        rows, mean = _centred(batch, self.units, self.mean.device, "Moment.update")
        if len(rows) == 0:
            return self
        return self.merge(Moment(len(rows), mean, rows.T @ rows))

    def merge(self, other: Moment) -> Moment:
        """Return the moment of both streams together; ``other`` moves to this one's device.

        Raises:
            ShapeError: the streams have vectors of different lengths.
        """
        _same_units("Moment.merge", self.units, other.units)
        if other.count == 0 or self.count == 0:
            return self if other.count == 0 else other
        device = self.mean.device
        shift, share, weight = _combine(self.count, other.count, self.mean, other.mean.to(device))
        scatter = self.scatter + other.scatter.to(device)
        scatter.addr_(shift, shift, alpha=weight)
        return Moment(self.count + other.count, self.mean + share * shift, scatter)

    @property
    def covariance(self) -> Tensor:
        """Centred second moment, normalised by the count, shape ``(units, units)``; raises when empty."""
        return self.scatter / _positive(self.count)

    @property
    def second_moment(self) -> Tensor:
        """Uncentred second moment ``E[h hᵀ]``, shape ``(units, units)``; raises when empty."""
        return torch.addr(self.covariance, self.mean, self.mean)

    @property
    def variance(self) -> Tensor:
        """Variance of each unit, shape ``(units,)``; raises when empty."""
        return self.scatter.diagonal() / _positive(self.count)

    @property
    def correlation(self) -> Tensor:
        """Correlations, shape ``(units, units)``; rows and columns of constant units are zero."""
        scale = _inverse_deviation(self.variance, self.mean)
        return self.covariance * scale[:, None] * scale[None, :]

    @property
    def constant_units(self) -> Tensor:
        """Indices of the units that never vary (see the module's policy), int64, rising."""
        return torch.nonzero(_is_constant(self.variance, self.mean)).flatten()


@dataclass(frozen=True, eq=False)
class CrossMoment:
    """Count, means, cross scatter and per-unit spreads of a pair of streams seen on the same samples.

    Attributes:
        count: number of sample pairs seen.
        mean_a: mean of the first stream, float64, shape ``(units_a,)``.
        mean_b: mean of the second, shape ``(units_b,)``.
        scatter: sum of centred outer products of A with B, float64, shape ``(units_a, units_b)``.
        spread_a: sum of centred squares of each unit of A, shape ``(units_a,)``.
        spread_b: the same for B, shape ``(units_b,)``.
    """

    count: int
    mean_a: Tensor
    mean_b: Tensor
    scatter: Tensor
    spread_a: Tensor
    spread_b: Tensor

    @classmethod
    def empty(cls, units_a: int, units_b: int, device: torch.device | str | None = None) -> CrossMoment:
        """Return the cross-moment of no samples."""

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=device)

        return cls(0, zeros(units_a), zeros(units_b), zeros(units_a, units_b), zeros(units_a), zeros(units_b))

    @property
    def units_a(self) -> int:
        """Length of the first stream's vectors."""
        return len(self.mean_a)

    @property
    def units_b(self) -> int:
        """Length of the second stream's vectors."""
        return len(self.mean_b)

    def update(self, batch_a: Tensor, batch_b: Tensor) -> CrossMoment:
        """Return the moment with paired rows added: shapes ``(samples, units_a)`` and ``(samples, units_b)``.

        Raises:
            ShapeError: wrong shapes, or different numbers of samples.
            DataError: NaN or infinite entries.
        """
        rows_a, mean_a = _centred(batch_a, self.units_a, self.mean_a.device, "CrossMoment.update, stream A")
        rows_b, mean_b = _centred(batch_b, self.units_b, self.mean_b.device, "CrossMoment.update, stream B")
        if len(rows_a) != len(rows_b):
            raise ShapeError(
                f"CrossMoment.update: stream A has {len(rows_a)} samples, stream B has {len(rows_b)}. "
                "Both networks must see the same examples."
            )
        if len(rows_a) == 0:
            return self
        part = CrossMoment(
            len(rows_a), mean_a, mean_b, rows_a.T @ rows_b, rows_a.square().sum(0), rows_b.square().sum(0)
        )
        return self.merge(part)

    def merge(self, other: CrossMoment) -> CrossMoment:
        """Return the moment of both sets of samples together; ``other`` moves to this one's device.

        Raises:
            ShapeError: the streams have vectors of different lengths.
        """
        _same_units("CrossMoment.merge, stream A", self.units_a, other.units_a)
        _same_units("CrossMoment.merge, stream B", self.units_b, other.units_b)
        if other.count == 0 or self.count == 0:
            return self if other.count == 0 else other
        device = self.mean_a.device
        shift_a, share, weight = _combine(self.count, other.count, self.mean_a, other.mean_a.to(device))
        shift_b = other.mean_b.to(device) - self.mean_b
        scatter = self.scatter + other.scatter.to(device)
        scatter.addr_(shift_a, shift_b, alpha=weight)
        return CrossMoment(
            self.count + other.count,
            self.mean_a + share * shift_a,
            self.mean_b + share * shift_b,
            scatter,
            self.spread_a + other.spread_a.to(device) + weight * shift_a.square(),
            self.spread_b + other.spread_b.to(device) + weight * shift_b.square(),
        )

    @property
    def covariance(self) -> Tensor:
        """Cross-covariance ``Cov(h_a, h_b)``, normalised by the count, shape ``(units_a, units_b)``."""
        return self.scatter / _positive(self.count)

    @property
    def second_moment(self) -> Tensor:
        """Uncentred cross-moment ``E[h_a h_bᵀ]``, shape ``(units_a, units_b)``; raises when empty."""
        return torch.addr(self.covariance, self.mean_a, self.mean_b)

    @property
    def variance_a(self) -> Tensor:
        """Variance of each unit of A, shape ``(units_a,)``; raises when empty."""
        return self.spread_a / _positive(self.count)

    @property
    def variance_b(self) -> Tensor:
        """Variance of each unit of B, shape ``(units_b,)``; raises when empty."""
        return self.spread_b / _positive(self.count)

    @property
    def correlation(self) -> Tensor:
        """Correlations, shape ``(units_a, units_b)``; rows and columns of constant units are zero."""
        scale_a = _inverse_deviation(self.variance_a, self.mean_a)
        scale_b = _inverse_deviation(self.variance_b, self.mean_b)
        return self.covariance * scale_a[:, None] * scale_b[None, :]

    @property
    def constant_units(self) -> tuple[Tensor, Tensor]:
        """Indices of the units of A, and of B, that never vary (see the module's policy), int64, rising."""
        return (
            torch.nonzero(_is_constant(self.variance_a, self.mean_a)).flatten(),
            torch.nonzero(_is_constant(self.variance_b, self.mean_b)).flatten(),
        )


def _centred(batch: Tensor, units: int, device: torch.device, name: str) -> tuple[Tensor, Tensor]:
    """Return the rows minus their mean, and the mean, in float64 on ``device``."""
    if batch.ndim != 2 or batch.shape[1] != units:
        raise ShapeError(
            f"{name}: expected shape (samples, {units}), found {tuple(batch.shape)}. "
            "Count positions of a convolution as samples."
        )
    rows = batch.detach().to(device=device, dtype=torch.float64)
    if len(rows) == 0:
        return rows, rows.new_zeros(units)
    mean = rows.mean(0)
    if not bool(torch.isfinite(mean).all()):
        units_hit = torch.nonzero(~torch.isfinite(mean)).flatten()[:5].tolist()
        raise DataError(
            f"{name}: NaN or infinite values in units {units_hit}. "
            "The network diverged or the inputs are damaged."
        )
    return rows - mean, mean


def _combine(count: int, other: int, mean: Tensor, other_mean: Tensor) -> tuple[Tensor, float, float]:
    """Return the shift between two means, the other's share of samples, and the outer product's weight."""
    share = other / (count + other)
    return other_mean - mean, share, count * share


def _same_units(name: str, units: int, other: int) -> None:
    if units != other:
        raise ShapeError(
            f"{name}: expected {units} units, found {other}. Only moments of one layer can be merged."
        )


def _positive(count: int) -> int:
    if count == 0:
        raise DataError(
            "Moments: no samples were seen, so there is no average. Update with at least one batch."
        )
    return count


def _is_constant(variance: Tensor, mean: Tensor) -> Tensor:
    return variance <= CONSTANT_TOLERANCE**2 * (variance + mean.square())


def _inverse_deviation(variance: Tensor, mean: Tensor) -> Tensor:
    """Return one over the standard deviation, and zero for constant units."""
    constant = _is_constant(variance, mean)
    return torch.where(constant, 0.0, torch.where(constant, 1.0, variance).rsqrt())
