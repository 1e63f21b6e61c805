"""Parameters of several layers in one tensor are matched as if each layer had a parameter of its own."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from isthmus import align, apply, discover
from isthmus.matching._pieces import chained, pieces_of
from isthmus.symmetry import IndexMap, Slot


class Chain(nn.Module):
    """Layers cut from one tensor, used in an order of their own."""

    def __init__(self, seed: int, order: tuple[int, ...]) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(seed)
        self.order = order
        for name, shape in {"first": (7, 5), "stack": (3, 7, 7), "last": (3, 7)}.items():
            self.register_parameter(name, nn.Parameter(torch.randn(shape, generator=g)))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(nn.functional.linear(x, self.get_parameter("first")))
        for k in self.order:
            h = torch.tanh(h @ self.get_parameter("stack")[k])
        return nn.functional.linear(h, self.get_parameter("last"))


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0)])
def test_layers_in_one_tensor_are_found_in_whatever_order_they_are_used(order: tuple[int, ...]) -> None:
    a, other, b = (Chain(seed, order).eval() for seed in (0, 1, 2))
    g = torch.Generator().manual_seed(3)
    x = torch.randn(60, 5, generator=g)
    spec = discover(a, x)
    near = {n: t + 0.05 * other.state_dict()[n] for n, t in a.state_dict().items()}
    turned = {n: torch.randperm(group.size, generator=g) for n, group in spec.groups.items()}
    b.load_state_dict(apply(spec, turned, near))
    for method in ("weights-incoming", "weights", "covariance", "activations"):
        found = align(a, b, batches=[x], method=method, spec=spec, check=False).apply(b).state_dict()
        torch.testing.assert_close(dict(found), near, msg=method)


def slot(axis: int, index: IndexMap, role: str = "", **block: IndexMap) -> Slot:
    return Slot("w", axis, index, tuple((int(k[1:]), m) for k, m in block.items()), role)  # type: ignore[arg-type]


def test_a_tensor_is_cut_where_no_group_acts_across() -> None:
    whole, first, rest = IndexMap(4, 4), IndexMap(5, 1, 0), IndexMap(5, 1, 1, 1, ((4, 1),))
    table = {
        1: [("a", slot(1, whole, _0=first)), ("b", slot(1, whole, _0=rest))],
        2: [("b", slot(2, whole, _0=first))],
    }
    one, two = pieces_of(table, (5, 4, 4))
    assert (one.shape, one.cut, two.shape, two.cut) == ((1, 4, 4), (0, 0, 1), (4, 4, 4), (0, 1, 4))
    assert [(k, g, s.block) for k, pairs in one.table.items() for g, s in pairs] == [
        (1, "a", ()),
        (2, "b", ()),
    ]
    assert [(k, g, s.block) for k, pairs in two.table.items() for g, s in pairs] == [(1, "b", ())]


def test_a_group_that_acts_on_all_segments_keeps_them_together() -> None:
    table = {1: [("a", slot(1, IndexMap(4, 4), _0=IndexMap(5, 1)))], 2: [("b", slot(2, IndexMap(4, 4)))]}
    (piece,) = pieces_of(table, (5, 4, 4))
    assert piece.cut is None
    assert piece.table is table
    assert pieces_of({}, (2, 2))[0].cut is None


def test_pieces_follow_one_another_as_they_are_computed() -> None:
    whole = IndexMap(4, 4)

    def layer(k: int, reads: str, holds: str) -> dict[int, list[tuple[str, Slot]]]:
        here = IndexMap(3, 1, k)
        return {
            1: [(reads, slot(1, whole, "reads", _0=here))],
            2: [(holds, slot(2, whole, "holds", _0=here))],
        }

    table: dict[int, list[tuple[str, Slot]]] = {1: [], 2: []}
    for one in (layer(0, "c", "d"), layer(1, "b", "c"), layer(2, "a", "b")):
        for axis, pairs in one.items():
            table[axis] += pairs
    assert chained(pieces_of(table, (3, 4, 4)), ()) == ["a", "b", "c", "d"]
    ring = {axis: [("x" if g == "a" else g, s) for g, s in pairs] for axis, pairs in table.items()}
    ring[2] = [("x" if g == "d" else g, s) for g, s in ring[2]]
    assert sorted(chained(pieces_of(ring, (3, 4, 4)), ())) == ["b", "c", "x"]
