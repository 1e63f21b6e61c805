"""Single entries of products: compiled and plain loops agree with the product itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from isthmus.couplings import Permutation, Rotation
from isthmus.matching import InnerProduct, _pairs, _sources
from isthmus.matching._certify import _near
from isthmus.matching._pairs import kernels_for, ordered, pair_products
from isthmus.symmetry import IndexMap, Slot

SHAPES = [((40, 30), 0), ((40, 30), 1), ((17,), 0), ((12, 10, 3, 3), 0), ((12, 10, 3, 3), 1), ((6, 5, 4), 2)]


@pytest.fixture(params=["compiled", "plain"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "compiled":
        pytest.importorskip("numba")
        monkeypatch.setattr(_pairs, "_COMPILED", 0)
    else:
        monkeypatch.setattr(_pairs, "_kernels", lambda: None)
    return request.param


def shuffled(size: int, seed: int) -> Tensor:
    return torch.randperm(size, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("shape", "axis"), SHAPES)
@pytest.mark.parametrize("reorder", [False, True])
def test_entries_are_those_of_the_product(
    way: str, shape: tuple[int, ...], axis: int, dtype: torch.dtype, reorder: bool
) -> None:
    generator = torch.Generator().manual_seed(1)
    a, b = (torch.randn(shape, dtype=dtype, generator=generator) for _ in range(2))
    order = {k: shuffled(n, k) for k, n in enumerate(shape) if k != axis} if reorder else {}
    rows, columns = (torch.randint(shape[axis], (25,), generator=generator) for _ in range(2))
    flat_a, flat_b = (t.double().movedim(axis, 0).reshape(shape[axis], -1) for t in (a, ordered(b, order)))
    expected = (flat_a @ flat_b.T)[rows, columns]
    assert (kernels_for(a, b) is not None) == (way == "compiled")
    found = pair_products(a, b, axis, rows, columns, order)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-12)


def test_no_pairs_have_no_entries(way: str) -> None:
    nothing = torch.zeros(0, dtype=torch.int64)
    assert pair_products(torch.ones(3, 4), torch.ones(3, 4), 0, nothing, nothing, {}).shape == (0,)


@pytest.mark.parametrize("size", [5, 128, 300])
def test_places_near_the_level_are_all_found(way: str, size: int) -> None:
    generator = torch.Generator().manual_seed(size)
    estimate = torch.randn(size, size, generator=generator)
    u, v = (torch.randn(size, generator=generator) + 1.2 for _ in range(2))
    expected = torch.nonzero((estimate >= u[:, None] + v).flatten()).flatten()
    assert len(expected) > 0
    found = _near(estimate, u, v, len(expected))
    assert found is not None
    assert torch.equal(found, expected)
    assert _near(estimate, u, v, len(expected) - 1) is None


@pytest.mark.parametrize(
    "tensor",
    [torch.zeros(4, 4, dtype=torch.bfloat16), torch.zeros(4, 4).T[:2], torch.zeros(4, 4, dtype=torch.int64)],
)
def test_other_tensors_take_the_plain_way(tensor: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_pairs, "_COMPILED", 0)
    assert kernels_for(tensor) is None


def test_small_tensors_load_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def load() -> Any:
        raise AssertionError("loaded")

    monkeypatch.setattr(_pairs, "_kernels", load)
    assert kernels_for(torch.zeros(100, 100)) is None


def test_without_numba_the_plain_way_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "isthmus.matching._kernels", None)
    monkeypatch.delattr("isthmus.matching._kernels", raising=False)
    _pairs._kernels.cache_clear()
    try:
        assert kernels_for(torch.zeros(600, 600)) is None
    finally:
        _pairs._kernels.cache_clear()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_short_entries_are_widened_piece_by_piece(
    way: str, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, axis: int
) -> None:
    monkeypatch.setattr(_sources, "PIECE", 50)
    generator = torch.Generator().manual_seed(2)
    a, b = (torch.randn(6, 9, 7, generator=generator).to(dtype) for _ in range(2))
    order = {k: shuffled(n, k) for k, n in enumerate(a.shape) if k != axis}
    rows, columns = (torch.randint(a.shape[axis], (25,), generator=generator) for _ in range(2))
    found = pair_products(a, b, axis, rows, columns, order)
    expected = pair_products(a.double(), b.double(), axis, rows, columns, order)
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-12)


@pytest.mark.parametrize("kind", ["permutation", "rotation"])
@pytest.mark.parametrize("piece", [2**23, 1000])
def test_large_tensors_are_valued_in_pieces(monkeypatch: pytest.MonkeyPatch, kind: str, piece: int) -> None:
    monkeypatch.setattr(_sources, "PIECE", piece)
    generator = torch.Generator().manual_seed(3)
    a, b = (torch.randn(600, 500, generator=generator) for _ in range(2))
    turn, _ = torch.linalg.qr(torch.randn(500, 500, generator=generator, dtype=torch.float64))
    order = shuffled(500, 1)
    coupling = Permutation(order) if kind == "permutation" else Rotation(turn)
    movers = ({1: [("g", Slot("t", 1, IndexMap(500, 500), role="holds"))]},)
    inner_product = InnerProduct((a,), (b,), movers)
    moved = b.double()[:, order] if kind == "permutation" else (b.double() @ turn.T).float().double()
    expected = float((a.double() * moved).sum())
    assert inner_product.inner({"g": coupling}) == pytest.approx(expected, abs=1e-4)
    distance = float((a.double() - moved).square().sum())
    assert inner_product.cost({"g": coupling}) == pytest.approx(distance, rel=1e-6)
