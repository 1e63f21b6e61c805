"""Coupling nested groups: gains, exactness where brute force can tell, fixed points, depth."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from isthmus import align, apply, discover
from isthmus.couplings import index_of
from isthmus.matching import Gain, assignment_solver, couple, total_gain


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def per_block(blocks: int, members: int) -> dict[str, Tensor]:
    """Cells of blocks that each permute their members on their own."""
    cells = torch.arange(blocks * members).reshape(blocks, members)
    return {"block": cells, **{f"m{i}": cells[i][:, None] for i in range(blocks)}}


def shared(blocks: int, members: int) -> dict[str, Tensor]:
    cells = torch.arange(blocks * members).reshape(blocks, members)
    return {"block": cells, "member": cells.T}


def everything(members: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """Every combination of permutations of small groups."""
    for combination in itertools.product(*(itertools.permutations(range(len(m))) for m in members.values())):
        yield {name: torch.tensor(p) for name, p in zip(members, combination, strict=True)}


def test_a_gain_reduces_moves_and_sums() -> None:
    matrix = torch.arange(16.0, dtype=torch.float64).reshape(4, 4)
    gain = Gain(matrix, shared(2, 2))
    assert gain.reduced("block").tolist() == [[0 + 5, 2 + 7], [8 + 13, 10 + 15]]
    assert gain.reduced("member").tolist() == [[0 + 10, 1 + 11], [4 + 14, 5 + 15]]
    swap = torch.tensor([1, 0])
    assert gain.index({"block": swap}).tolist() == [2, 3, 0, 1]
    assert gain.index({"block": swap, "member": swap}).tolist() == [3, 2, 1, 0]
    assert gain.value({}) == float(matrix.trace())
    assert gain.moved({"block": swap}).value({}) == gain.value({"block": swap})
    assert total_gain([gain, gain], {"member": swap}) == 2 * gain.value({"member": swap})


def test_moving_twice_is_moving_by_the_composition() -> None:
    """Three units, so that a wrong direction shows."""
    gain = Gain(
        torch.randn(3, 3, dtype=torch.float64, generator=generator(0)), {"g": torch.arange(3)[:, None]}
    )
    p, q = torch.tensor([1, 2, 0]), torch.tensor([0, 2, 1])
    assert gain.moved({"g": p}).value({"g": q}) == pytest.approx(gain.value({"g": p[q]}))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("blocks", "members"), [(1, 3), (2, 2), (3, 2), (2, 3), (3, 1)])
def test_members_of_their_own_are_matched_exactly(blocks: int, members: int, seed: int) -> None:
    layout = per_block(blocks, members)
    cells = blocks * members
    gain = Gain(torch.randn(cells, cells, dtype=torch.float64, generator=generator(seed)), layout)
    found = couple([gain], list(layout), assignment_solver)
    best = max(total_gain([gain], p) for p in everything(layout))
    assert total_gain([gain], found) == pytest.approx(best)


@pytest.mark.parametrize("seed", range(4))
def test_shared_members_reach_a_fixed_point_that_a_planted_one_is(seed: int) -> None:
    layout = shared(4, 5)
    truth = {name: torch.randperm(len(m), generator=generator(seed)) for name, m in layout.items()}
    noise = torch.randn(20, 20, dtype=torch.float64, generator=generator(seed + 9))
    index = Gain(torch.zeros(20, 20), layout).index(truth)
    planted = torch.zeros(20, 20, dtype=torch.float64)
    planted[torch.arange(20), index] = 1.0
    gain = Gain(planted + 0.2 * noise, layout)
    found = couple([gain], list(layout), assignment_solver)
    assert all(torch.equal(index_of(found[name]), truth[name]) for name in layout)
    for name in layout:
        others = {k: p for k, p in found.items() if k != name}
        best = couple([gain.moved(others)], [name], assignment_solver)
        assert total_gain([gain], {**others, **best}) <= total_gain([gain], found) + 1e-9


@pytest.mark.parametrize("seed", range(6))
def test_the_identity_is_never_worsened_when_kept(seed: int) -> None:
    layout = shared(3, 4)
    gain = Gain(torch.randn(12, 12, dtype=torch.float64, generator=generator(seed)), layout)
    found = couple([gain], list(layout), assignment_solver, keep=True)
    assert total_gain([gain], found) >= gain.value({})


def test_gains_of_blocks_alone_and_of_members_alone_count() -> None:
    """A router that lists the experts, and a rotary table that all heads share."""
    layout = shared(3, 3)
    flat = Gain(torch.zeros(9, 9, dtype=torch.float64), layout)
    ring, back = torch.tensor([1, 2, 0]), torch.tensor([2, 0, 1])
    of_blocks = torch.zeros(3, 3, dtype=torch.float64)
    of_blocks[torch.arange(3), ring] = 1.0
    of_members = torch.zeros(3, 3, dtype=torch.float64)
    of_members[torch.arange(3), back] = 1.0
    single = torch.arange(3)[:, None]
    gains = [flat, Gain(of_blocks, {"block": single}), Gain(of_members, {"member": single})]
    found = couple(gains, ["block", "member"], assignment_solver)
    assert torch.equal(index_of(found["block"]), ring)
    assert torch.equal(index_of(found["member"]), back)


def test_members_on_an_axis_without_blocks_count_where_they_belong() -> None:
    """Segments of one axis, one per block: what member 0 gains there is not spread over other blocks."""
    layout = per_block(2, 2)
    flat = Gain(torch.zeros(4, 4, dtype=torch.float64), layout)
    segments = {"m0": torch.tensor([[0], [1]]), "m1": torch.tensor([[2], [3]])}
    matrix = torch.zeros(4, 4, dtype=torch.float64)
    matrix[0, 1] = matrix[1, 0] = 1.0  # member 0 swaps
    matrix[2, 2] = matrix[3, 3] = 1.0  # member 1 stays
    gains = [flat, Gain(matrix, segments)]
    found = couple(gains, list(layout), assignment_solver)
    assert index_of(found["m0"]).tolist() == [1, 0]
    assert index_of(found["m1"]).tolist() == [0, 1]


def test_groups_that_share_nothing_are_solved_apart() -> None:
    gains = [
        Gain(torch.randn(n, n, dtype=torch.float64, generator=generator(n)), {k: torch.arange(n)[:, None]})
        for k, n in (("a", 3), ("b", 4))
    ]
    found = couple(gains, ["a", "b"], assignment_solver)
    assert found["a"] == assignment_solver(gains[0].matrix)
    assert found["b"] == assignment_solver(gains[1].matrix)


def test_three_levels() -> None:
    """Groups of heads, heads in each, and dimensions shared by the heads of a group (grouped queries)."""
    count = 2 * 3 * 2
    cells = torch.arange(count).reshape(2, 3, 2)
    layout = {"kv": cells.reshape(2, -1)}
    for g in range(2):
        layout[f"head{g}"] = cells[g]
        layout[f"dim{g}"] = cells[g].T
    truth = {name: torch.randperm(len(m), generator=generator(3)) for name, m in layout.items()}
    planted = torch.zeros(count, count, dtype=torch.float64)
    planted[torch.arange(count), Gain(planted, layout).index(truth)] = 1.0
    noise = 0.1 * torch.randn(count, count, dtype=torch.float64, generator=generator(4))
    found = couple([Gain(planted + noise, layout)], list(layout), assignment_solver)
    assert all(torch.equal(index_of(found[name]), truth[name]) for name in layout)


def test_a_group_that_is_not_asked_for_stays() -> None:
    layout = shared(3, 2)
    gain = Gain(torch.randn(6, 6, dtype=torch.float64, generator=generator(0)), layout)
    found = couple([gain], ["member"], assignment_solver)
    assert list(found) == ["member"]
    assert found["member"] == assignment_solver(gain.reduced("member"))


class EnsembleOfStackedLayers(nn.Module):
    """Members in one tensor for each layer, whose hidden units are those of no layer; only the head is one."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(seed)
        shapes = {"first": (3, 5, 6), "bias": (3, 6), "second": (3, 6, 4), "head": (2, 4)}
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.randn(shape, generator=g)))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.einsum("bc,mcd->bmd", x, self.get_parameter("first")) + self.get_parameter("bias")
        h = torch.einsum("bmd,mde->bme", h.relu(), self.get_parameter("second"))
        return F.linear(h.relu().mean(1), self.get_parameter("head"))


@pytest.mark.parametrize("method", ["weights-incoming", "covariance"])
def test_one_pass_meets_parameters_outside_layers_in_the_order_of_computation(method: str) -> None:
    a, other = EnsembleOfStackedLayers(0).eval(), EnsembleOfStackedLayers(1)
    g = torch.Generator().manual_seed(2)
    x = torch.randn(40, 5, generator=g)
    spec = discover(a, x)
    near = {n: t + 0.05 * other.state_dict()[n] for n, t in a.state_dict().items()}
    turned = {n: torch.randperm(group.size, generator=g) for n, group in spec.groups.items()}
    b = EnsembleOfStackedLayers(3).eval()
    b.load_state_dict(apply(spec, turned, near))
    found = align(a, b, batches=[x], method=method).apply(b).state_dict()
    torch.testing.assert_close(dict(found), near)
