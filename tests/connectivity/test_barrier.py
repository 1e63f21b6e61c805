from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from isthmus.connectivity import interpolate, loss_barrier
from isthmus.connectivity._barrier import bootstrap_means, chord_of
from isthmus.connectivity._positions import path_positions
from isthmus.errors import CheckpointError, DataError, ShapeError


def test_barrier_by_hand() -> None:
    found = loss_barrier(torch.tensor([1.0, 2.5, 4.0, 2.0]), torch.tensor([0.0, 0.25, 0.5, 1.0]))
    assert found.height == 2.5  # 4 above the chord's 1.5
    assert found.at == 0.5
    assert found.spacing == 0.5


def test_the_chord_is_tilted_towards_t_equal_one() -> None:
    found = loss_barrier(torch.tensor([0.0, 1.0, 1.0, 4.0]), torch.tensor([0.0, 0.25, 0.75, 1.0]))
    assert (found.height, found.at) == (0.0, 0.0)
    assert chord_of(torch.tensor([0.0, 1.0, 4.0]), torch.tensor([0.0, 0.25, 1.0])).tolist() == [0.0, 1.0, 4.0]


@pytest.mark.parametrize("losses", [[1.0, 1.0, 1.0], [3.0, 0.5, 2.0]])
def test_no_rise_is_zero(losses: list[float]) -> None:
    found = loss_barrier(torch.tensor(losses), torch.tensor([0.0, 0.5, 1.0]))
    assert (found.height, found.at) == (0.0, 0.0)


def test_two_points_see_no_barrier() -> None:
    assert loss_barrier(torch.tensor([1.0, 9.0]), torch.tensor([0.0, 1.0])).height == 0.0


def test_the_first_of_equal_maxima_is_reported() -> None:
    ts = torch.linspace(0, 1, 5, dtype=torch.float64)
    assert loss_barrier(torch.tensor([0.0, 1.0, 0.5, 1.0, 0.0]), ts).at == 0.25


def test_barrier_refuses_bad_curves() -> None:
    ts = torch.tensor([0.0, 0.5, 1.0])
    with pytest.raises(ShapeError, match=r"found losses \(2,\) and positions \(3,\)"):
        loss_barrier(torch.zeros(2), ts)
    with pytest.raises(DataError, match="needs finite losses"):
        loss_barrier(torch.tensor([0.0, float("nan"), 0.0]), ts)
    with pytest.raises(ShapeError, match="rise strictly from 0 to 1"):
        loss_barrier(torch.zeros(3), torch.tensor([0.0, 0.0, 1.0]))


@pytest.mark.parametrize("points", [2, 3, 11, np.int64(11)])
def test_even_positions(points: int) -> None:
    ts = path_positions(points)
    assert len(ts) == points
    assert ts.dtype == torch.float64
    assert ts.tolist() == [pytest.approx(k / (points - 1)) for k in range(points)]


@pytest.mark.parametrize("read", [list, tuple, np.array, torch.tensor])
def test_given_positions(read: Callable[[list[float]], Any]) -> None:
    assert path_positions(read([0.0, 0.3, 1.0])).tolist() == pytest.approx([0.0, 0.3, 1.0], abs=1e-7)


@pytest.mark.parametrize(
    "given", [[0.0], [], [0.0, 0.5], [0.1, 1.0], [0.0, 0.6, 0.5, 1.0], [[0.0, 1.0]], [0.0, float("nan"), 1.0]]
)
def test_bad_positions(given: list[float]) -> None:
    with pytest.raises(ShapeError, match="must rise strictly from 0 to 1"):
        path_positions(given)


@pytest.mark.parametrize("points", [1, 0, -3])
def test_too_few_positions(points: int) -> None:
    with pytest.raises(ShapeError, match=f"points of 2 or more, found {points}"):
        path_positions(points)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.complex64], ids=str)
def test_interpolate(dtype: torch.dtype) -> None:
    a = {"w": torch.tensor([1.0, 2.0, 0.1], dtype=dtype), "count": torch.tensor(3)}
    b = {"w": torch.tensor([3.0, -2.0, 0.1], dtype=dtype), "count": torch.tensor(8)}
    before = a["w"].clone(), b["w"].clone()
    quarter = interpolate(a, b, 0.25)
    assert torch.equal(quarter["w"][:2], torch.tensor([1.5, 1.0]).to(dtype))
    assert quarter["w"].dtype == dtype
    assert quarter["count"] == 3
    for t in (0.0, 0.3, 1.0):  # exact where exactness is possible
        assert interpolate(a, b, t)["w"][2] == a["w"][2]
    assert torch.equal(interpolate(a, b, 0.0)["w"], a["w"])
    assert torch.equal(interpolate(a, b, 1.0)["w"], b["w"])
    assert torch.equal(interpolate(a, b, 2.0)["w"][:2], torch.tensor([5.0, -6.0]).to(dtype))
    interpolate(a, b, 0.0)["w"].zero_()
    assert torch.equal(a["w"], before[0])
    assert torch.equal(b["w"], before[1])


def test_interpolate_takes_modules_and_keeps_ties() -> None:
    def tied() -> nn.Module:
        model = nn.ModuleDict({"x": nn.Linear(2, 2, bias=False), "y": nn.Linear(2, 2, bias=False)})
        model["x"].weight = model["y"].weight
        return model

    a, b = tied(), tied()
    found = interpolate(a, b.state_dict(), 0.5)
    assert found["x.weight"] is found["y.weight"]
    middle = 0.5 * (a["x"].weight + b["x"].weight)  # type: ignore[index]
    torch.testing.assert_close(found["x.weight"], middle.detach())


def test_interpolate_refuses_bad_input() -> None:
    a = {"w": torch.zeros(2)}
    with pytest.raises(CheckpointError, match="A and B are different architectures: B lacks 'w'"):
        interpolate(a, {}, 0.5)
    with pytest.raises(ShapeError, match="'w': A has shape"):
        interpolate(a, {"w": torch.zeros(3)}, 0.5)
    with pytest.raises(CheckpointError, match="B: 'w' has 1 NaN"):
        interpolate(a, {"w": torch.tensor([0.0, math.inf])}, 0.5)
    with pytest.raises(DataError, match="expected a finite t, found nan"):
        interpolate(a, a, math.nan)
    bad = {"w": torch.full((2,), math.nan)}
    assert bool(interpolate(a, bad, 0.5, check=False)["w"].isnan().all())


def test_bootstrap_agrees_with_the_analytic_standard_error() -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(3, 400, generator=generator, dtype=torch.float64) * torch.tensor([[1.0], [2.0], [5.0]])
    means = bootstrap_means(rows, 2000, generator)
    assert means.shape == (2000, 3)
    torch.testing.assert_close(means.std(0), rows.std(1) / 20, rtol=0.08, atol=0)
    torch.testing.assert_close(means.mean(0), rows.mean(1), rtol=0, atol=0.03)


def test_bootstrap_draws_the_same_examples_for_all_rows() -> None:
    rows = torch.arange(50.0).double().repeat(2, 1)
    rows[1] += 7
    means = bootstrap_means(rows, 20, torch.Generator().manual_seed(3))
    torch.testing.assert_close(means[:, 1] - means[:, 0], torch.full((20,), 7.0).double())
    assert torch.equal(means, bootstrap_means(rows, 20, torch.Generator().manual_seed(3)))
    assert not torch.equal(means, bootstrap_means(rows, 20, torch.Generator().manual_seed(4)))
