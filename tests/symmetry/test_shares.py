"""What stays and what holds it: shares of entries, by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from symmetry_helpers import build, normal
from torch import Tensor, nn

from isthmus import align
from isthmus.symmetry import AxisGroup, IndexMap, PinnedAxis, Slot, SymmetrySpec, discover

X = normal(2, 3)
LOGITS, FEATURES = "the model's output '0'", "the model's output '1'"


class Both(nn.Module):
    """Logits and the features they are made of: 3 → 8 → 8 → 2."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(3, 8), nn.Linear(8, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Any:
        features = self.b(self.a(x).relu()).relu()
        return self.c(features), features


def test_shares_of_a_network_that_returns_its_features() -> None:
    """122 entries, of which the 8 of b.bias, the 16 of c.weight and the 2 of c.bias stay."""
    spec = discover(build(Both), X)
    assert len(spec.groups) == 1
    assert spec.fraction_moved == pytest.approx(1 - 26 / 122)
    assert spec.pinned_shares == {FEATURES: pytest.approx(24 / 122), LOGITS: pytest.approx(18 / 122)}
    said = (
        "72 % of the entries lie on an axis that the model's output '1' holds: say with outputs=... (--outputs) "
        "which of the 2"
    )
    assert spec.notes[0].startswith(said)
    assert spec.pinned_summary() == (
        f"21 % of 122 entries are pinned: 20 % by {FEATURES}, 15 % by {LOGITS}. {spec.notes[0]}"
    )
    assert spec.pinned_summary() in str(spec)


def test_an_output_chosen_leaves_no_note() -> None:
    spec = discover(build(Both), X, outputs=0)
    assert len(spec.groups) == 2
    assert spec.notes == ()
    assert spec.pinned_summary() == f"2 % of 122 entries are pinned: 2 % by {LOGITS}."


def test_alignments_say_what_stays() -> None:
    a, b = build(Both), build(Both, seed=1)
    found = align(a, b, args=X, method="weights")
    assert found.notes == found.spec.notes != ()
    assert str(found).endswith(found.spec.pinned_summary())
    chosen = align(a, b, args=X, method="weights", outputs="0")
    assert (len(chosen.permutations), chosen.notes) == (2, ())
    assert torch.allclose(chosen.apply(b)(X)[0], b(X)[0], atol=1e-6)
    assert not torch.allclose(chosen.apply(b)(X)[1], b(X)[1], atol=1e-3)


def test_operators_are_named_and_small_causes_counted() -> None:
    shapes = {"w": (4, 10), "v": (3,), "kernel": (4, 1, 3, 3)}
    half = Slot("w", 0, IndexMap(4, 2))
    pinned = (
        PinnedAxis("w", 0, 2, "order counts", "aten.cumsum", "body"),
        PinnedAxis("w", 1, 5, "one"),
        PinnedAxis("w", 1, 3, "two"),
        PinnedAxis("w", 1, 2, "three"),
        PinnedAxis("v", 0, 3, "order counts", "aten.cumsum", "head"),
    )
    moving = AxisGroup("g", 2, (half,))
    kernels = AxisGroup("k", 4, (Slot("kernel", 0, IndexMap(4, 4)),))
    spec = SymmetrySpec({"g": moving, "k": kernels}, pinned, shapes)
    assert spec.fraction_moved == pytest.approx(56 / 79)
    assert spec.pinned_shares == {
        "aten.cumsum (order counts)": pytest.approx(23 / 79),
        "one": pytest.approx(10 / 79),
        "two": pytest.approx(6 / 79),
        "three": pytest.approx(4 / 79),
    }
    assert spec.pinned_summary() == (
        "29 % of 79 entries are pinned: 29 % by aten.cumsum (order counts), 13 % by one, 8 % by two and 1 other "
        "cause."
    )

    more = SymmetrySpec({"g": moving, "k": kernels}, (*pinned, PinnedAxis("w", 1, 2, "four")), shapes)
    assert more.pinned_summary().endswith(" by two and 2 other causes.")


def test_nothing_stays_and_nothing_is_there() -> None:
    whole = AxisGroup("g", 4, (Slot("w", 0, IndexMap(4, 4)),))
    assert SymmetrySpec({"g": whole}, (), {"w": (4,)}).pinned_summary() == "All 4 entries move."
    assert SymmetrySpec({}, (), {}).pinned_summary() == "The network has no entries."
    assert SymmetrySpec({}, (), {"w": (400,)}).pinned_summary() == "100 % of 400 entries are pinned."
    assert SymmetrySpec({}, (), {}).fraction_moved == 0.0
