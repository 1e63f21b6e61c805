from __future__ import annotations

import math
import sys

import numpy as np
import pytest
import torch

from isthmus.errors import DataError, MissingExtraError, ShapeError
from isthmus.transport import assign, entropic_plan


@pytest.fixture
def cost() -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(0).random((6, 6)))


def test_marginals_and_limit(cost):
    pytest.importorskip("ot")
    best = assign(cost).value / 6
    values = []
    for regularisation in (1.0, 0.2, 0.05):
        found = entropic_plan(cost, regularisation)
        assert found.status == "converged"
        assert max(found.row_error, found.column_error) <= 1e-9
        assert found.plan.sum() == pytest.approx(1.0, abs=1e-8)
        # The plan trades at most its gain in entropy, log 6, for cost.
        assert best - 1e-8 <= found.value <= best + regularisation * math.log(6)
        values.append(found.value)
    assert values == sorted(values, reverse=True)


def test_unequal_masses_and_shapes(cost):
    pytest.importorskip("ot")
    rows = [0.5, 0.3, 0.2]
    found = entropic_plan(cost[:3, :2].numpy(), 0.1, row_masses=rows, column_masses=[0.0, 1.0])
    assert found.status == "converged"
    assert found.plan[:, 1].tolist() == pytest.approx(rows, abs=1e-8)


def test_running_out_of_iterations_is_a_status(cost):
    pytest.importorskip("ot")
    found = entropic_plan(cost, 1e-3, max_iterations=3)
    assert found.status == "not converged"
    assert found.iterations == 3
    assert max(found.row_error, found.column_error) > 1e-9


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"cost": np.zeros((0, 2)), "regularisation": 1.0}, ShapeError, "at least one row and column"),
        ({"cost": np.eye(2), "regularisation": 0.0}, DataError, "positive regularisation, found 0.0"),
        (
            {"cost": np.eye(2), "regularisation": 1.0, "row_masses": [1.0]},
            ShapeError,
            "expected 2 row_masses",
        ),
        (
            {"cost": np.eye(2), "regularisation": 1.0, "column_masses": [1.0, 1.0]},
            DataError,
            "non-negative column_masses summing to 1, found a sum of 2",
        ),
    ],
)
def test_bad_input(arguments, error, message):
    pytest.importorskip("ot")
    with pytest.raises(error, match=message):
        entropic_plan(**arguments)


def test_missing_extra(monkeypatch, cost):
    monkeypatch.setitem(sys.modules, "ot", None)
    with pytest.raises(MissingExtraError, match=r"isthmus\[ot\]"):
        entropic_plan(cost, 0.1)
