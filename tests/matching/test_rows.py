"""Rows of activations that are units of another group: both relabellings are found, and never in silence."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from isthmus import SymmetrySpec, align, apply, discover
from isthmus.layers import find_sites
from isthmus.matching import _activations
from isthmus.matching._alignment import Alignment
from isthmus.moments import Actions
from isthmus.moments._rows import _Orbits
from isthmus.symmetry import trace
from isthmus.testing import planted_pair, randomise_state


class Latents(nn.Module):
    """A Perceiver: learned latents attend to the inputs and to each other, and their mean is read."""

    inputs = (7, 6)

    def __init__(self, latents: int = 5, width: int = 12) -> None:
        super().__init__()
        self.latents = nn.Parameter(torch.randn(latents, width))
        self.inp, self.q, self.k, self.v, self.o = (
            nn.Linear(size, width) for size in (6, width, width, width, width)
        )
        self.norm = nn.LayerNorm(width)
        self.up, self.down, self.head = nn.Linear(width, 16), nn.Linear(16, width), nn.Linear(width, 3)

    def attend(self, h: Tensor, x: Tensor) -> Tensor:
        weights = (self.q(h) @ self.k(x).transpose(-1, -2) / 4).softmax(-1)
        return self.o(weights @ self.v(x))

    def forward(self, x: Tensor) -> Tensor:
        x, h = self.inp(x), self.latents.expand(len(x), -1, -1)
        for source in (x, None):
            h = h + self.attend(self.norm(h), h if source is None else source)
        return self.head((h + self.down(functional.gelu(self.up(self.norm(h))))).mean(1))


class Members(nn.Module):
    """An ensemble: stacked first layers, then layers that all members share, and the mean of the outputs."""

    inputs = (6,)

    def __init__(self, members: int = 4, width: int = 10) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.randn(members, 6, width) / 2)
        self.bias = nn.Parameter(torch.randn(members, width))
        self.mid, self.head = nn.Linear(width, width), nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = (torch.einsum("nd,mdh->nmh", x, self.first) + self.bias).relu()
        return self.head(self.mid(h).relu()).mean(1)


class Tokens(nn.Module):
    """Learned tokens beside those of the data: only some rows may move."""

    inputs = (4, 6)

    def __init__(self, learned: int = 3, width: int = 12) -> None:
        super().__init__()
        self.learned = nn.Parameter(torch.randn(learned, width))
        self.inp, self.q, self.k, self.mix = (nn.Linear(size, width) for size in (6, width, width, width))
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.cat([self.learned.expand(len(x), -1, -1), self.inp(x)], 1)
        h = h + (self.q(h) @ self.k(h).transpose(1, 2) / 3).softmax(-1) @ torch.tanh(self.mix(h))
        return self.head(torch.tanh(h).mean(1))


class Pooled(nn.Module):
    """Pooled tokens that a token-mixing layer reads: each of two groups is rows of the other."""

    inputs = (7, 6)

    def __init__(self, pooled: int = 5, width: int = 9) -> None:
        super().__init__()
        self.inp, self.pool = nn.Linear(6, width), nn.Linear(7, pooled)
        self.mix, self.back = nn.Linear(pooled, 8), nn.Linear(8, pooled)
        self.up, self.down, self.head = nn.Linear(width, 16), nn.Linear(16, width), nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.pool(self.inp(x).relu().transpose(1, 2)).relu()
        h = (h + self.back(functional.gelu(self.mix(h)))).transpose(1, 2)
        return self.head(torch.tanh(h + self.down(functional.gelu(self.up(h)))).mean(1))


class Merged(nn.Module):
    """Learned tokens that share an axis with the examples."""

    inputs = (6,)

    def __init__(self, learned: int = 5, width: int = 12) -> None:
        super().__init__()
        self.learned = nn.Parameter(torch.randn(learned, width))
        self.inp, self.mid, self.head = nn.Linear(6, width), nn.Linear(width, width), nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.inp(x).relu()[:, None] * torch.sigmoid(self.learned)
        h = self.mid(h.reshape(-1, h.shape[-1])).relu()
        return self.head(h.reshape(len(x), len(self.learned), -1).amax(1))


class Products(nn.Module):
    """Products of all pairs of units: the units are the rows and the channels of one layer."""

    inputs = (6,)

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.inp, self.mid, self.head = nn.Linear(6, width), nn.Linear(width, 10), nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.inp(x))
        return self.head(self.mid(h[:, :, None] * h[:, None] + h[:, :, None]).relu().mean(1))


NETWORKS = [Latents, Members, Tokens, Pooled, Merged, Products]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def built(factory: Any, seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return randomise_state(factory(), generator(seed)).eval()


def batches(factory: Any, *sizes: int) -> list[Tensor]:
    """Batches of several sizes, so that positions on shared axes differ between them."""
    return list(torch.randn(sum(sizes), *factory.inputs, generator=generator(2)).split(sizes))


def found(
    factory: Any, method: str, noise: float = 0.0, **options: Any
) -> tuple[Alignment, dict[str, Tensor]]:
    net = built(factory)
    data = batches(factory, 24, 24, 10)
    planted = planted_pair(net, discover(net, data[0][:3]), noise, generator(3))
    return align(net, planted.state_b, batches=data, method=method, **options), planted.permutations


FAST = [(Latents, "activations"), (Members, "correlation"), (Pooled, "activations"), (Merged, "correlation")]
CASES = [
    pytest.param(n, m, marks=[] if (n, m) in FAST else [pytest.mark.slow])
    for n in NETWORKS
    for m in ("activations", "correlation")
]


@pytest.mark.parametrize("noise", [pytest.param(0.0, marks=pytest.mark.slow), 0.05])
@pytest.mark.parametrize(("factory", "method"), CASES)
def test_planted_relabellings_of_rows_and_units_are_recovered(
    factory: Any, method: str, noise: float
) -> None:
    alignment, wanted = found(factory, method, noise)
    assert all(torch.equal(alignment.permutations[g], p) for g, p in wanted.items())
    assert alignment.status == "converged"
    (note,) = (n for n in alignment.notes if n.startswith("rows of activations are units of"))
    assert "rows and units were matched in turn" in note


@pytest.mark.parametrize("factory", [Merged, pytest.param(Latents, marks=pytest.mark.slow)])
def test_covariance_sums_over_the_rows_of_a_alone(factory: Any) -> None:
    """No row of B is looked at, so their order does not matter."""
    alignment, wanted = found(factory, "covariance")
    assert all(torch.equal(alignment.permutations[g], p) for g, p in wanted.items())
    assert alignment.notes == ()


@pytest.mark.parametrize("start", [0, *(pytest.param(k, marks=pytest.mark.slow) for k in (1, 2))])
def test_every_start_leads_there(start: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Means over the rows, weights or the identity: with one of them alone, of networks that are nearly the same."""
    original = _activations._Turns._all_starts

    def only(self: Any, first: Any) -> Any:
        yield list(original(self, first))[start]

    monkeypatch.setattr(_activations._Turns, "_all_starts", only)
    net = built(Latents)
    data = batches(Latents, 40)
    spec = discover(net, data[0][:3])
    moved = {name: torch.arange(g.size) for name, g in spec.groups.items()}
    moved["latents"] = torch.tensor([1, 2, 0, 3, 4])
    state = apply(spec, moved, net.state_dict())
    alignment = align(net, state, batches=data, method="activations")
    wanted = spec.invert(moved)
    assert all(torch.equal(alignment.permutations[g], p) for g, p in wanted.items())
    assert alignment.notes[0].startswith("rows of activations are units of latents: rows and units")
    assert "the best of 1 starts" in alignment.notes[0]


def test_rows_that_the_spec_does_not_move_are_averaged() -> None:
    """A spec without the latents: B's stay in their own order, and the units are found all the same."""
    net = built(Latents)
    data = batches(Latents, 40)
    spec = discover(net, data[0][:3])
    planted = planted_pair(net, spec, 0.0, generator(3))
    part = spec.restrict([name for name in spec.groups if name != "latents"])
    alignment = align(net, planted.state_b, batches=data, method="activations", spec=part)
    for name in part.groups:
        assert torch.equal(alignment.permutations[name], planted.permutations[name])
    note = "rows of activations are units that the spec does not move (latents): compared by their mean"
    assert note in alignment.notes


def test_groups_of_another_name_are_known_by_their_slots() -> None:
    net = built(Tokens)
    data = batches(Tokens, 40)
    spec = discover(net, data[0][:3])
    planted = planted_pair(net, spec, 0.0, generator(3))
    renamed = SymmetrySpec(
        {f"my {n}": type(g)(f"my {n}", g.size, g.slots, (), "") for n, g in spec.groups.items()},
        spec.pinned,
        spec.shapes,
    )
    alignment = align(net, planted.state_b, batches=data, method="correlation", spec=renamed)
    for name, wanted in planted.permutations.items():
        assert torch.equal(alignment.permutations[f"my {name}"], wanted)


def test_activations_that_do_not_follow_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """What discovery says of activations is checked by running: a wrong label costs a view, and says so."""
    original = Actions.movers

    def wrong(self: Actions, node: str) -> Any:
        return {} if node in ("linear_1", "relu") else original(self, node)

    monkeypatch.setattr(Actions, "movers", wrong)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
    x = torch.randn(40, 6, generator=generator())
    planted = planted_pair(net, discover(net, x[:3]), 0.0, generator(3))
    alignment = align(net, planted.state_b, batches=[x], method="activations")
    assert (
        "0: activations at 1 of 1 layers do not move as its units do, so they were not compared"
        in alignment.notes
    )
    assert "0: no layer reads or computes its units; matched by its parameters" in alignment.notes
    assert all(torch.equal(alignment.permutations[g], p) for g, p in planted.permutations.items())


def test_networks_without_such_rows_take_one_pass() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
    reads: list[int] = []

    class Data:
        def __iter__(self) -> Any:
            reads.append(1)
            yield torch.randn(20, 6, generator=generator())

    alignment = align(net, net.state_dict(), batches=Data(), method="activations", args=(torch.zeros(2, 6),))
    assert (alignment.status, alignment.notes, len(reads)) == ("single pass", (), 2)  # shapes, then moments


def test_positions_of_an_axis_fall_into_orbits() -> None:
    orbits = _Orbits(7)
    orbits.join([1, 3])
    orbits.join([3, 5])
    orbits.join([6, 4])
    count, index = orbits.numbered
    assert count == 4
    assert index.tolist() == [0, 1, 2, 1, 3, 1, 3]


def test_actions_say_where_groups_act_on_activations() -> None:
    net, x = built(Merged), batches(Merged, 4)[0]
    spec = discover(net, x)
    traced = trace(net, (x,))
    sites = find_sites(traced)
    actions = Actions(traced, sites, spec)
    slot = actions.row_slot(sites[1].source, "learned")
    assert slot is not None
    assert slot.index.positions().shape == (5, 4)  # five tokens, each once for every example
    assert actions.unplaced == frozenset()
    assert Actions(traced, sites, spec.restrict(["mid"])).unplaced == frozenset()
