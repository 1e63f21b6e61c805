"""Operators without a rule, tried by experiment; rules for quantisation and reductions; constants that are regular."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.ao.quantization as quantisation
from symmetry_helpers import Net, build, check, described, group, normal
from torch import Tensor, nn

from isthmus.symmetry import SymmetrySpec, discover, trace
from isthmus.symmetry._experiment import Passing, passing_axes
from isthmus.symmetry._operation import rule_of

X = normal(2, 3)
HIDDEN = group(4, "a.weight[0]", "a.bias[0]", "b.weight[1]")


def two(work: Callable[..., Tensor], **parts: Any) -> nn.Module:
    layers = {"a": nn.Linear(3, 4), "b": nn.Linear(4, 2)}
    return build(lambda: Net(lambda m, x: m.b(work(m, m.a(x))), **layers, **parts))


# --- Custom operators ------------------------------------------------------------------------------------------
def operator(name: str, work: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def plain(x: Tensor, w: Tensor) -> Tensor:
        return work(x, w)

    made = torch.library.custom_op(f"isthmus_trial::{name}", plain, mutates_args=())
    made.register_fake(lambda x, w: torch.empty_like(work(x, w)))
    return made


_calls: list[int] = []


def _counting(x: Tensor, w: Tensor) -> Tensor:
    _calls.append(1)
    return x * (1 + len(_calls)) + 0 * w


GATED = operator("gated", lambda x, w: x.tanh() * w + x.mean(0, keepdim=True))
NEIGHBOURS = operator("neighbours", lambda x, w: x * w + x.roll(1, -1))
FIRST = operator("first", lambda x, w: x * w + x[:, :1].round())
RANKED = operator("ranked", lambda x, w: x * w + x.argmax(-1, keepdim=True))
MIRRORED = operator("mirrored", lambda x, w: x * w + x.flip(-1))
RARE = operator("rare", lambda x, w: x * w + torch.where(x == 0, torch.arange(4.0, dtype=x.dtype), 0.0))
COUNTING = operator("counting", _counting)
POOLED = operator("pooled", lambda x, w: (x * w).sum(-1, keepdim=True))


def test_an_operator_that_only_passes_axes_on_moves_them() -> None:
    model = two(lambda m, h: GATED(h, m.w), w=(4,))
    spec = check(model, X, {group(4, "a.weight[0]", "a.bias[0]", "w[0]", "b.weight[1]")})
    assert spec.experiments == ("isthmus_trial.gated",)
    assert "passed by experiment, not by a rule: isthmus_trial.gated" in str(spec)
    assert SymmetrySpec.from_json(spec.to_json()) == spec
    assert spec.restrict(["w"]).experiments == spec.experiments


@pytest.mark.parametrize("work", [NEIGHBOURS, FIRST, RANKED, MIRRORED, RARE, COUNTING])
def test_an_operator_that_sees_places_pins(work: Callable[..., Tensor]) -> None:
    spec = discover(two(lambda m, h: work(h, m.w), w=(4,)), X)
    assert spec.groups == {}
    assert any(p.reason.startswith("operator without a rule") and p.tensor == "w" for p in spec.pinned)


def test_what_does_not_depend_on_the_order_is_free() -> None:
    spec = discover(two(lambda m, h: POOLED(h, m.w).expand(-1, 4), w=(4,)), X)
    assert described(spec) == {group(4, "a.weight[0]", "a.bias[0]", "w[0]"), group(4, "b.weight[1]")}


@torch.library.custom_op("isthmus_trial::looked_up", mutates_args=())
def looked_up(x: Tensor, index: Tensor) -> Tensor:
    return x[index]


@looked_up.register_fake
def _(x: Tensor, index: Tensor) -> Tensor:
    return x.new_empty((len(index), x.shape[1]))


def nodes(model: nn.Module, *args: Tensor) -> dict[str, Any]:
    return {str(n.target): n for n in trace(model, args).graph.nodes if n.op == "call_function"}


def test_nothing_is_concluded_of_integers_random_numbers_and_mutation() -> None:
    found = nodes(two(lambda m, h: looked_up(h, torch.tensor([1, 0]))), X)
    assert passing_axes(found["isthmus_trial.looked_up.default"]) is None
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    x.meta["val"] = torch.empty(3, 4)
    for target in (torch.ops.aten.relu_.default, torch.ops.aten.rand_like.default, torch.relu):
        node = graph.call_function(target, (x,))
        node.meta["val"] = torch.empty(3, 4)
        assert passing_axes(node) is None
    node = graph.call_function(torch.ops.aten.relu.default, (x,))
    node.meta["val"] = torch.empty(3, 4)
    assert passing_axes(node) == [Passing((0,), (0,)), Passing((1,), (1,))]
    x.meta["val"] = torch.empty(1 << 10, 1 << 10)
    assert passing_axes(node) is None


@pytest.mark.parametrize(
    "work",
    [
        lambda m, h: h * torch.linalg.svdvals(h).sum(),
        lambda m, h: torch.linalg.solve(m.w @ m.w.T + torch.eye(4), h[..., None])[..., 0],
        lambda m, h: h @ torch.linalg.inv(m.w @ m.w.T + torch.eye(4)),
        lambda m, h: h * torch.pdist(h).sum(),
        lambda m, h: torch.renorm(h, 2, 0, 1.0),
    ],
)
def test_operators_of_pytorch_without_a_rule(work: Callable[..., Tensor]) -> None:
    spec = check(two(work, w=(4, 3)), X, every_slot=False)
    assert any(g.size == 4 and "b.weight[1]" in map(str, g.slots) for g in spec.groups.values()), f"{spec}"


# --- Rules -----------------------------------------------------------------------------------------------------
ROWS = torch.tensor([0, 2])


@pytest.mark.parametrize(
    "work",
    [
        lambda m, h: torch.fake_quantize_per_tensor_affine(h, 0.1, 0, -128, 127),
        lambda m, h: torch.zeros(3, 4).scatter_reduce(0, ROWS[:, None].expand(2, 4), h, "amax"),
        lambda m, h: torch.zeros(3, 4).index_reduce(0, ROWS, h, "mean"),
        lambda m, h: h - torch.quantile(h, 0.3, dim=1, keepdim=True),
        lambda m, h: h * torch.nanquantile(h, torch.tensor([0.2, 0.7]), dim=1).sum(),
        lambda m, h: torch.sparse.mm(torch.eye(2).to_sparse(), h),
        lambda m, h: h.cummax(0).values + h.logcumsumexp(0),
    ],
)
@pytest.mark.filterwarnings("ignore:index_reduce")
def test_rules(work: Callable[..., Tensor]) -> None:
    check(two(work), X, {HIDDEN})


def test_quantiles_along_the_places_of_a_sequence_stay_in_order() -> None:
    model = two(lambda m, h: torch.quantile(h, torch.tensor([0.1, 0.2, 0.3, 0.9]), dim=1).T)
    assert {str(s) for g in check(model, X).groups.values() for s in g.slots} == {"a.weight[0]", "a.bias[0]"}


def test_channels_keep_their_scale() -> None:
    zeros = torch.zeros(4, dtype=torch.int32)

    def work(m: Any, h: Tensor) -> Tensor:
        return torch.fake_quantize_per_channel_affine(h, m.s.abs() + 0.05, zeros, 1, -128, 127)

    check(two(work, s=(4,)), X, {group(4, "a.weight[0]", "a.bias[0]", "s[0]", "b.weight[1]")})


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("fused", [True, False])
def test_quantisation_aware_networks_have_their_groups(fused: bool) -> None:
    """Observers are off, so that the network keeps no state; its weights are rounded channel by channel."""
    plain = quantisation.QConfig(
        activation=quantisation.FakeQuantize.with_args(
            observer=quantisation.MovingAverageMinMaxObserver, quant_min=0, quant_max=255
        ),
        weight=quantisation.default_weight_fake_quant,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
        model.qconfig = quantisation.get_default_qat_qconfig("fbgemm") if fused else plain  # type: ignore[assignment]
        model = quantisation.prepare_qat(model.train())
        model(X)
    model = model.apply(quantisation.disable_observer).eval()
    spec = check(model, X, every_slot=False)
    slots = {str(s) for g in spec.groups.values() for s in g.slots}
    assert {"0.weight[0]", "0.bias[0]", "2.weight[1]"} <= slots
    assert ("0.weight_fake_quant.scale[0]" in slots) == fused


# --- Constants -------------------------------------------------------------------------------------------------
def _written() -> Tensor:
    made = torch.full((4, 4), 0.5)
    for k in range(4):
        made[k, k] = 2.0
    return made


@pytest.mark.parametrize(
    "matrix",
    [
        lambda: torch.eye(4),
        lambda: 1 - torch.eye(4),
        lambda: torch.diag(torch.full((4,), 3.0)) + 0.1,
        _written,
        lambda: (torch.arange(4)[:, None] != torch.arange(4)).double().float(),
        lambda: torch.ones(4, 4).fill_diagonal_(5.0),
    ],
)
def test_one_number_on_the_diagonal_and_one_beside_it_tie_two_axes(matrix: Callable[[], Tensor]) -> None:
    check(two(lambda m, h: h @ matrix()), X, {HIDDEN})


@pytest.mark.parametrize("matrix", [lambda: torch.eye(4).roll(1, 0), lambda: torch.tril(torch.ones(4, 4))])
def test_other_matrices_pin(matrix: Callable[[], Tensor]) -> None:
    check(two(lambda m, h: h @ matrix()), X, set())


def test_a_diagonal_of_weights_moves_with_its_units() -> None:
    check(
        two(lambda m, h: h @ torch.diag(m.d), d=(4,)),
        X,
        {group(4, "a.weight[0]", "a.bias[0]", "d[0]", "b.weight[1]")},
    )
    check(two(lambda m, h: h @ torch.diag_embed(m.d, 1), d=(3,)), X, set())
    assert rule_of("aten.diag_embed") is not None


# --- Precision and size of the numbers ------------------------------------------------------------------------------
@torch.library.custom_op("isthmus_test::sums_in_single_precision", mutates_args=())
def sums_in_single_precision(x: Tensor) -> Tensor:
    return x.cumsum(-1) if x.dtype == torch.float32 else 2 * x


@sums_in_single_precision.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("isthmus_test::sums_the_small", mutates_args=())
def sums_the_small(x: Tensor) -> Tensor:
    return x.cumsum(-1) if bool((x.abs() < 0.01).all()) else 2 * x


@sums_the_small.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


@pytest.mark.parametrize("operator", [sums_in_single_precision, sums_the_small])
def test_an_operator_is_also_tried_in_the_traced_precision_and_on_small_numbers(
    operator: Callable[[Tensor], Tensor],
) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(operator(self.a(x)))

    assert discover(Net().eval(), torch.randn(5, 3)).groups == {}
