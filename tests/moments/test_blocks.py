"""Moments from float32 blocks: within their bound of float64 ones, however the rows arrive."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from isthmus.errors import DataError
from isthmus.moments import CrossMoment, Moment
from isthmus.moments._blocks import NARROW, ROWS, CrossStream, Stream

_BOUND = 272 * 2.0**-24


def rows_of(count: int, units: int, seed: int) -> Tensor:
    """Return rectified, correlated rows with means well above their spread, a dead and a constant unit."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(count, 8, generator=generator)
    rows = torch.relu(hidden @ torch.randn(8, units, generator=generator) + 3.0)
    rows[:, 0], rows[:, 1] = 0.0, 0.1
    return rows


def pieces(rows: Tensor, size: int) -> list[Tensor]:
    return list(rows.split(size))


@pytest.mark.parametrize("size", [7, 500, ROWS, 2 * ROWS + 1])
def test_covariances_stay_within_the_bound(size: int) -> None:
    rows = rows_of(2 * ROWS + 30, NARROW + 5, 0)
    stream, exact = Stream(rows.shape[1]), Moment.empty(rows.shape[1]).update(rows.double())
    for part in pieces(rows, size):
        stream.update(part)
    found = stream.result()
    scale = exact.variance.sqrt()
    error = (found.covariance - exact.covariance).abs()
    assert bool((error <= _BOUND * torch.outer(scale, scale) + 1e-18).all())
    assert float(error.max()) > 0.0, "products are float32"
    torch.testing.assert_close(found.mean, exact.mean, rtol=1e-13, atol=1e-14)
    assert found.count == len(rows)
    assert found.constant_units.tolist() == exact.constant_units.tolist() == [0, 1]


@pytest.mark.parametrize("size", [33, 2 * ROWS + 1])
def test_cross_covariances_stay_within_the_bound(size: int) -> None:
    a, b = (rows_of(2 * ROWS + 30, NARROW, seed) for seed in (1, 2))
    stream, exact = CrossStream(NARROW), CrossMoment.empty(NARROW, NARROW).update(a.double(), b.double())
    for x, y in zip(pieces(a, size), pieces(b, size), strict=True):
        stream.update(x, y)
    found = stream.result()
    scale = torch.outer(exact.variance_a.sqrt(), exact.variance_b.sqrt())
    error = (found.covariance - exact.covariance).abs()
    assert bool((error <= _BOUND * scale + 1e-18).all())
    assert float(error.max()) > 0.0, "products are float32"
    torch.testing.assert_close(found.variance_a, exact.variance_a, rtol=1e-6, atol=1e-14)
    torch.testing.assert_close(found.variance_b, exact.variance_b, rtol=1e-6, atol=1e-14)
    for one, other in zip(found.constant_units, exact.constant_units, strict=True):
        assert one.tolist() == other.tolist() == [0, 1]


@pytest.mark.parametrize(("units", "dtype"), [(NARROW - 1, torch.float32), (NARROW, torch.float64)])
def test_narrow_and_float64_streams_are_exact(units: int, dtype: torch.dtype) -> None:
    rows = rows_of(300, units, 3).to(dtype)
    stream, cross = Stream(units), CrossStream(units)
    stream.update(rows)
    cross.update(rows, rows)
    exact = Moment.empty(units).update(rows)
    assert torch.equal(stream.result().scatter, exact.scatter)
    torch.testing.assert_close(cross.result().scatter, exact.scatter, rtol=1e-13, atol=1e-12)


def test_rows_may_be_overwritten_after_they_were_seen() -> None:
    rows = rows_of(50, NARROW, 4)
    before, stream = Moment.empty(NARROW).update(rows), Stream(NARROW)
    stream.update(rows)
    rows.zero_()
    torch.testing.assert_close(stream.result().mean, before.mean)


def test_empty_streams_and_damaged_rows() -> None:
    assert Stream(3).result().count == CrossStream(3).result().count == 0
    rows = rows_of(ROWS, NARROW, 5)
    rows[3, 4] = torch.nan
    with pytest.raises(DataError, match=r"NaN or infinite values in units \[4\]"):
        Stream(NARROW).update(rows)
    with pytest.raises(DataError, match=r"NaN or infinite values in units \[4\]"):
        CrossStream(NARROW).update(rows_of(ROWS, NARROW, 6), rows)


@pytest.mark.gpu
def test_moments_stay_on_the_device() -> None:
    rows = rows_of(2 * ROWS, NARROW, 7)
    stream, cross = Stream(NARROW), CrossStream(NARROW)
    stream.update(rows.cuda())
    cross.update(rows.cuda(), rows.cuda())
    assert stream.result().scatter.is_cuda
    assert cross.result().scatter.is_cuda
    exact = Moment.empty(NARROW).update(rows)
    scale = torch.outer(exact.variance.sqrt(), exact.variance.sqrt())
    assert bool(((stream.result().covariance.cpu() - exact.covariance).abs() <= _BOUND * scale + 1e-18).all())
