from __future__ import annotations

from functools import reduce

import pytest
import torch

from isthmus.errors import DataError, ShapeError
from isthmus.moments._accumulators import CONSTANT_TOLERANCE, CrossMoment, Moment

PARTS = (5, 1, 0, 17, 64)


def stream(units: int, seed: int = 0, samples: int = sum(PARTS), mean: float = 0.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(units, units, generator=generator, dtype=torch.float64)
    return torch.randn(samples, units, generator=generator, dtype=torch.float64) @ mixing + mean


def tensors(moment: Moment | CrossMoment) -> list[torch.Tensor]:
    return [v for v in vars(moment).values() if isinstance(v, torch.Tensor)]


def assert_equal(left: Moment | CrossMoment, right: Moment | CrossMoment, rtol: float = 1e-11) -> None:
    assert left.count == right.count
    for x, y in zip(tensors(left), tensors(right), strict=True):
        torch.testing.assert_close(x, y, rtol=rtol, atol=rtol * max(1.0, float(y.abs().max())))


@pytest.mark.parametrize("units", [1, 2, 7])
def test_streaming_equals_all_at_once(units):
    x = stream(units, mean=3.0)
    streamed = reduce(Moment.update, x.split(PARTS), Moment.empty(units))
    assert_equal(streamed, Moment.empty(units).update(x))
    torch.testing.assert_close(streamed.mean, x.mean(0))
    torch.testing.assert_close(streamed.covariance, torch.cov(x.T, correction=0).reshape(units, units))
    torch.testing.assert_close(streamed.second_moment, x.T @ x / len(x))
    torch.testing.assert_close(streamed.variance, x.var(0, correction=0))
    torch.testing.assert_close(streamed.correlation, torch.corrcoef(x.T).reshape(units, units))


@pytest.mark.parametrize("shape", [(1, 1), (2, 1), (4, 6)])
def test_cross_streaming_equals_all_at_once(shape):
    a, b = stream(shape[0], 1, mean=-2.0), stream(shape[1], 2, mean=5.0)
    b[:, 0] += a[:, -1]
    streamed = CrossMoment.empty(*shape)
    for part_a, part_b in zip(a.split(PARTS), b.split(PARTS), strict=True):
        streamed = streamed.update(part_a, part_b)
    assert_equal(streamed, CrossMoment.empty(*shape).update(a, b))
    centred_a, centred_b = a - a.mean(0), b - b.mean(0)
    torch.testing.assert_close(streamed.covariance, centred_a.T @ centred_b / len(a))
    torch.testing.assert_close(streamed.second_moment, a.T @ b / len(a))
    joint = torch.corrcoef(torch.cat([a, b], 1).T)[: shape[0], shape[0] :]
    torch.testing.assert_close(streamed.correlation, joint)
    torch.testing.assert_close(streamed.variance_a, a.var(0, correction=0))
    torch.testing.assert_close(streamed.variance_b, b.var(0, correction=0))


def test_cross_moment_of_a_stream_with_itself_is_its_moment():
    x = stream(5, 3)
    moment, cross = Moment.empty(5).update(x), CrossMoment.empty(5, 5).update(x, x)
    torch.testing.assert_close(cross.covariance, moment.covariance)
    torch.testing.assert_close(cross.variance_a, moment.variance)


def test_merge_is_a_monoid():
    x, y = stream(4, 4, mean=1e3), stream(3, 5, mean=-1e3)
    singles = [Moment.empty(4).update(p) for p in x.split(PARTS)]
    pairs = [
        CrossMoment.empty(4, 3).update(p, q) for p, q in zip(x.split(PARTS), y.split(PARTS), strict=True)
    ]
    for parts, empty in ((singles, Moment.empty(4)), (pairs, CrossMoment.empty(4, 3))):
        first, second, *_, last = parts
        assert_equal(first.merge(second).merge(last), first.merge(second.merge(last)))
        assert_equal(first.merge(second), second.merge(first))
        assert_equal(first.merge(empty), first)
        assert_equal(empty.merge(first), first)
        assert_equal(reduce(type(first).merge, parts), reduce(type(first).merge, reversed(parts)))


def test_values_are_frozen_and_inputs_untouched():
    x = stream(3)
    before, empty = x.clone(), Moment.empty(3)
    moment = empty.update(x)
    moment.merge(moment)
    moment.update(x)
    assert torch.equal(x, before)
    assert empty.count == 0
    assert_equal(moment, Moment.empty(3).update(x), rtol=0.0)


def test_float32_with_a_large_mean_keeps_its_variance():
    x = (stream(3, 6, samples=2000) + 1e4).float()
    moment = reduce(Moment.update, x.split(100), Moment.empty(3))
    exact = torch.cov(x.double().T, correction=0)
    torch.testing.assert_close(moment.covariance, exact, rtol=1e-9, atol=1e-9)
    raw = x.T @ x / len(x) - torch.outer(x.mean(0), x.mean(0))
    assert float((raw - exact).abs().max()) > 1.0  # the uncentred float32 way is useless here


@pytest.mark.parametrize("samples", [1, 2, 50])
def test_constant_units_are_listed_and_uncorrelated(samples):
    x, y = stream(6, 7, samples=samples), stream(4, 8, samples=samples)
    x[:, 1], x[:, 4], y[:, 2] = 0.0, 0.1, -1e8
    x[:, 5] = 7.0 * (1.0 + 0.1 * CONSTANT_TOLERANCE * x[:, 0].sign())
    moment = reduce(Moment.update, x.split(7), Moment.empty(6))
    cross = CrossMoment.empty(6, 4)
    for part_x, part_y in zip(x.split(7), y.split(7), strict=True):
        cross = cross.update(part_x, part_y)
    all_constant = samples == 1
    expected_x = list(range(6)) if all_constant else [1, 4, 5]
    expected_y = list(range(4)) if all_constant else [2]
    assert moment.constant_units.tolist() == expected_x
    assert [u.tolist() for u in cross.constant_units] == [expected_x, expected_y]
    assert torch.isfinite(moment.correlation).all()
    assert torch.isfinite(cross.correlation).all()
    assert not moment.correlation[expected_x].any()
    assert not cross.correlation[expected_x].any()
    assert not cross.correlation[:, expected_y].any()
    if not all_constant:
        assert moment.correlation[0, 0] == pytest.approx(1.0)
        assert cross.correlation[0, 0] != 0.0


def test_slow_but_real_variation_is_not_constant():
    x = torch.linspace(-1.0, 1.0, 101, dtype=torch.float64)[:, None] + 1e6
    assert Moment.empty(1).update(x).constant_units.tolist() == []


@pytest.mark.parametrize("name", ["covariance", "second_moment", "variance", "correlation", "constant_units"])
def test_empty_has_no_averages(name):
    with pytest.raises(DataError, match="no samples were seen"):
        getattr(Moment.empty(2), name)


@pytest.mark.parametrize("name", ["covariance", "second_moment", "variance_a", "variance_b", "correlation"])
def test_empty_pair_has_no_averages(name):
    with pytest.raises(DataError, match="no samples were seen"):
        getattr(CrossMoment.empty(2, 2), name)


def test_bad_batches():
    with pytest.raises(ShapeError, match=r"expected shape \(samples, 3\), found \(2, 4\)"):
        Moment.empty(3).update(torch.zeros(2, 4))
    with pytest.raises(ShapeError, match="Count positions"):
        Moment.empty(3).update(torch.zeros(3))
    with pytest.raises(DataError, match=r"NaN or infinite values in units \[1\]"):
        Moment.empty(2).update(torch.tensor([[0.0, float("nan")], [0.0, 1.0]]))
    with pytest.raises(ShapeError, match="stream A has 2 samples, stream B has 3"):
        CrossMoment.empty(1, 1).update(torch.zeros(2, 1), torch.zeros(3, 1))
    with pytest.raises(ShapeError, match="expected 2 units, found 3"):
        Moment.empty(2).merge(Moment.empty(3))
    with pytest.raises(ShapeError, match="stream B: expected 2 units, found 3"):
        CrossMoment.empty(1, 2).merge(CrossMoment.empty(1, 3))
