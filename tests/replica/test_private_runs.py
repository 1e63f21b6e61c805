"""Networks that keep more than their state: every function that runs one sees the state it is given, nothing else."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F
from replica_networks import (
    CLASSES,
    EXAMPLES,
    KINDS,
    CachedBias,
    MergedInEvaluation,
    build,
    data,
    normal,
    wanted,
)
from torch import Tensor, nn

import isthmus
from isthmus.batches import Batch
from isthmus.errors import ModelError
from isthmus.evaluation import bind
from isthmus.moments import SiteRunner, refresh_batchnorm
from isthmus.states import state_of

pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*The .grad attribute of a Tensor that is not a leaf:UserWarning"),
]
FEW = [
    "cached bias, attribute",
    "cached bias, buffer",
    "cached bias, for ever",
    "tied by list",
    "tied by closure",
    "tied by data",
    "old weight norm",
]


def close(found: Tensor, right: Tensor) -> None:
    torch.testing.assert_close(found, right, rtol=0, atol=2e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_a_state_is_run_as_a_network_that_holds_it(kind: str) -> None:
    a, b = build(kind, 0), build(kind, 1)
    state = {k: v.clone() for k, v in state_of(b).items()}
    found = bind(a, state)(Batch((KINDS[kind][1],)))
    right = wanted(kind, state)
    close(found, right)
    assert float((found - wanted(kind, state_of(a))).abs().max()) > 1e-2


@pytest.mark.parametrize("kind", FEW)
def test_a_line_runs_every_point_as_itself(kind: str) -> None:
    a, b = build(kind, 0), build(kind, 1)
    found = isthmus.line(a, b, data(kind), points=3, bootstrap=0).curves["data"].loss.tolist()
    targets = data(kind)[0][1]
    states = (state_of(a), isthmus.interpolate(a, b, 0.5), state_of(b))
    right = [float(F.cross_entropy(wanted(kind, state), targets)) for state in states]
    assert found == pytest.approx(right, abs=2e-6)


@pytest.mark.parametrize("kind", FEW)
def test_relabelling_preserves_the_function(kind: str) -> None:
    """Also when heads turn in a ring of three, so that a cache which stays behind shows."""
    a, b = build(kind, 0), build(kind, 1)
    inputs, right = KINDS[kind][1], wanted(kind, state_of(b))
    alignment = isthmus.align(a, b, batches=[inputs], method="activations")
    turned = {name: torch.arange(g.size).roll(1) for name, g in alignment.spec.groups.items()}
    ring = isthmus.Alignment(turned, alignment.spec, "turned", settings=alignment.settings)
    assert turned
    for moved in (alignment, ring):
        close(wanted(kind, moved.apply(state_of(b))), right)
        close(moved.apply(b)(inputs).detach(), right)
    assert any(not torch.equal(v, b.state_dict()[k]) for k, v in ring.apply(b).state_dict().items())


def test_heads_of_a_cached_bias_are_found() -> None:
    for how in ("buffer", "dictionary", "once", "for ever"):
        spec = isthmus.discover(build(f"cached bias, {how}", 0), normal(2, 5, 6))
        assert [g.size for g in spec.groups.values()] == [3, 4, 4, 4], how
        assert any(slot.tensor == "bias" for slot in spec.groups["bias"].slots)


def test_a_cache_of_zeros_frees_no_head() -> None:
    """An averaged copy that never left evaluation: what it keeps was laid out before the weights came."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = CachedBias("attribute")
        nn.init.zeros_(model.bias)
        averaged = torch.optim.swa_utils.AveragedModel(model.eval())
        nn.init.normal_(model.bias, std=2.0)
        averaged.update_parameters(model)
    x = normal(EXAMPLES, 5, 6)
    assert not averaged.module.laid.any()
    right = wanted("cached bias, attribute", state_of(averaged.module))
    close(bind(averaged)(Batch((x,))), right)
    spec = isthmus.discover(averaged, x)
    assert isthmus.verify(spec, averaged, x).passed
    heads = next(name for name, g in spec.groups.items() if any(s.tensor == "module.bias" for s in g.slots))
    torn = spec.without_slot(heads, next(s for s in spec.groups[heads].slots if s.tensor == "module.bias"))
    assert not isthmus.verify(torn, averaged, x).passed
    close(isthmus.align(averaged, averaged, args=x, method="weights").apply(averaged)(x).detach(), right)


def test_weights_that_evaluation_merges_are_merged_once() -> None:
    x = normal(EXAMPLES, 4)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        a, b = (MergedInEvaluation().eval() for _ in "ab")
    before = a.layer.weight.clone()
    close(bind(a, state_of(b))(Batch((x,))), b(x).detach())
    close(isthmus.align(a, b, args=x, method="weights").apply(b)(x).detach(), b(x).detach())
    assert torch.equal(a.layer.weight, before)


def test_statistics_of_another_state_are_its_own() -> None:
    a, b = build("cached bias, attribute", 0), build("cached bias, attribute", 1)
    x = KINDS["cached bias, attribute"][1]
    close(SiteRunner(a, Batch((x,))).run(state_of(b), Batch((x,))).detach(), b(x).detach())


def test_refreshed_statistics_are_those_of_the_state() -> None:
    def network(seed: int) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return nn.Sequential(CachedBias("attribute"), nn.BatchNorm1d(CLASSES)).eval()

    a, b, x = network(0), network(1), normal(EXAMPLES, 5, 6)
    found = refresh_batchnorm(a, state_of(b), [x])
    torch.testing.assert_close(found["1.running_mean"], b[0](x).mean(0).detach(), rtol=1e-4, atol=1e-5)
    assert a.training is False
    assert not a[1].training
    assert not a[1].running_mean.any()


def test_what_two_networks_hold_differently_is_named() -> None:
    class Leaky(nn.Module):
        def __init__(self, slope: float, table: float) -> None:
            super().__init__()
            self.slope, self.layer = slope, nn.Linear(4, CLASSES)
            self.register_buffer("table", torch.full((4,), table), persistent=False)

        def forward(self, x: Tensor) -> Tensor:
            return F.leaky_relu(self.layer(x * self.table), self.slope)

    batches = [(normal(EXAMPLES, 4), torch.arange(EXAMPLES) % CLASSES)]
    a, b, c = Leaky(0.1, 1.0).eval(), Leaky(0.5, 1.0).eval(), Leaky(0.1, 2.0).eval()
    with pytest.raises(ModelError, match=r"differently besides their states: 'slope' \(0\.1 against 0\.5\)"):
        isthmus.line(a, b, batches, points=2)
    with pytest.raises(ModelError, match=r"differently besides their states: the tensor 'table'"):
        isthmus.line(a, c, batches, points=2)
    with pytest.raises(ModelError, match=r"differently besides their states: the tensor 'table'"):
        isthmus.align(a, c, batches=[batches[0][0]], method="activations")


def test_code_that_differs_is_said_to() -> None:
    class Own(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).relu()

    batches = [(normal(EXAMPLES, 4), torch.arange(EXAMPLES) % CLASSES)]
    with pytest.raises(ModelError, match=r"besides their states: the network \(Linear against Own\)"):
        isthmus.line(nn.Linear(4, CLASSES).eval(), Own(4, CLASSES).eval(), batches, points=2)


GLOBAL: dict[str, Tensor] = {}


class ReadsGlobal(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.out = nn.Linear(4, 4), nn.Linear(4, CLASSES)
        GLOBAL["w"] = self.layer.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.layer(x) @ GLOBAL["w"].T)


class Memoised(nn.Module):
    """Keeps what it computes from its weights where a copy keeps A's: beside the module, by the module."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, CLASSES)

    @functools.lru_cache  # noqa: B019
    def scale(self) -> float:
        return float(self.layer.weight.norm())

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) * self.scale()


def test_what_is_kept_beside_the_module_is_refused() -> None:
    a, b = Memoised().eval(), Memoised().eval()
    with pytest.raises(ModelError, match="Memoised keeps something computed from weights outside its module"):
        bind(a, state_of(b))(Batch((normal(3, 4),)))
    with pytest.raises(ModelError, match="after other weights had been run, a state gave other outputs"):
        isthmus.line(a, b, [(normal(3, 4), torch.tensor([0, 1, 2]))], points=2)


def test_cached_parametrisations_are_not_those_of_another_state() -> None:
    a, b = build("parametrised", 0), build("parametrised", 1)
    with nn.utils.parametrize.cached():
        a(KINDS["parametrised"][1])
        close(bind(a, state_of(b))(Batch((KINDS["parametrised"][1],))), wanted("parametrised", state_of(b)))
        found = isthmus.line(a, b, data("parametrised"), points=3, bootstrap=0).curves["data"].loss.tolist()
    assert found == pytest.approx(
        isthmus.line(a, b, data("parametrised"), points=3, bootstrap=0).curves["data"].loss.tolist(), abs=1e-6
    )
