"""What couplings do to their units, in numbers and words: each kind says its own."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from isthmus.couplings import (
    Coupling,
    CouplingSummary,
    Linear,
    Monomial,
    Nested,
    Permutation,
    Plan,
    Rotation,
    summary_of,
)

RING = torch.tensor([1, 2, 0, 3])
TURN = torch.tensor([[0.6, -0.8], [0.8, 0.6]], dtype=torch.float64)


def factors(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize(
    ("coupling", "words"),
    [
        (Permutation(RING), "4 units: permutation, 3 moved"),
        (Permutation(torch.arange(0)), "0 units: permutation, 0 moved"),
        (Permutation(torch.arange(1)), "1 unit: permutation, 0 moved"),
        (Monomial(RING, factors(1, 1, 1, 1)), "4 units: permutation, 3 moved"),
        (Monomial(torch.arange(0), factors()), "0 units: permutation, 0 moved"),
        (Monomial(RING, factors(1, -1, -1, 1)), "4 units: signs and permutation, 2 flipped, 3 moved"),
        (
            Monomial(RING, factors(0.5, 1, 3, 2)),
            "4 units: scales and permutation, factors 0.5 to 3, median 1.5, 3 moved",
        ),
        (
            Monomial(RING, factors(0.5, -1, 3, 2)),
            "4 units: signs, scales and permutation, 1 flipped, factors 0.5 to 3, median 1.5, 3 moved",
        ),
        (Rotation(TURN), "rotation, 2 dimensions"),
        (Rotation(torch.eye(1)), "rotation, 1 dimension"),
        (Linear(torch.diag(factors(4, 2))), "invertible map, 2 dimensions, condition number 2"),
        (Linear(torch.zeros(0, 0)), "invertible map, 0 dimensions, condition number 1"),
        (Plan(torch.ones(2, 3)), "transport plan, 2 units"),
        (
            Nested(
                Permutation(torch.tensor([1, 0, 2])),
                [Rotation(TURN), Rotation(TURN), Permutation(torch.arange(2))],
            ),
            "6 units: blocks of rotation (2), permutation (1), 4 moved",
        ),
    ],
)
def test_every_kind_says_what_it_does(coupling: Coupling, words: str) -> None:
    found = summary_of(coupling)
    assert str(found) == words
    assert found.units == coupling.shape[0]
    assert found.mixes == (found.moved is None)


def test_numbers_are_plain_and_gradients_are_not_followed() -> None:
    learnt = factors(-0.5, 2, 1, 1).requires_grad_()
    found = summary_of(Monomial(RING, learnt))
    assert found == CouplingSummary("signs and scales", 4, 3, 1, (0.5, 1.0, 2.0))
    assert found.to_dict() == {
        "kind": "signs and scales",
        "units": 4,
        "moved": 3,
        "flipped": 1,
        "factors": [0.5, 1.0, 2.0],
        "condition": None,
        "inside": {},
    }


def test_a_class_of_ones_own_has_its_own_name() -> None:
    class Mirror(Rotation):
        pass

    class Other:
        shape = (3, 3)

    assert summary_of(Mirror(TURN)).kind == "rotation"
    assert str(summary_of(Other())) == "Other, 3 dimensions"  # pyright: ignore[reportArgumentType]
