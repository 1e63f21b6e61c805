"""The fast way of running a line against the plain one, and the adaptive choice of points."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from isthmus.batches import Batch
from isthmus.connectivity import _engine, _graph, _measure, _networks, interpolate, line
from isthmus.connectivity._adaptive import ceiling, next_points
from isthmus.connectivity._engine import Engine
from isthmus.connectivity._graph import AffineStep, trace_steps
from isthmus.errors import DataError, ModelError
from isthmus.evaluation import bind
from isthmus.paths import mixed
from isthmus.states import state_of
from isthmus.testing import randomise_state, reference_network


def seeded(factory: Callable[[], nn.Module], seed: int) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = factory().eval()
        return randomise_state(model, torch.Generator().manual_seed(seed)).eval()


class Residual(nn.Module):
    """Images, both kinds of shortcut, in-place rectification and sum, a view after a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(8, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.body, self.body_norm = nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.side, self.act = nn.Conv2d(6, 6, 1, padding_mode="circular"), nn.ReLU(inplace=True)
        self.last = nn.Conv2d(6, 5, 3, stride=2, padding=1, groups=1)
        self.last_norm = nn.BatchNorm2d(5, affine=False)
        self.head = nn.Linear(5 * 9, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.act(self.norm(self.stem(x)))
        h = F.relu(self.side(h) + self.body_norm(self.body(h)))
        h += h.mean((2, 3), keepdim=True)
        h = self.last_norm(self.last(h)).relu()
        return self.head(h.view(h.size(0), -1))


class Block(nn.Module):
    """A transformer block written with parameters, keyword inputs and a constant mask."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.place = nn.Embedding(11, 8), nn.Parameter(torch.randn(5, 8))
        self.query, self.out = nn.Linear(8, 24), nn.Linear(8, 8)
        self.first, self.second = nn.LayerNorm(8), nn.LayerNorm(8)
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)
        self.register_buffer("mask", torch.ones(5, 5).tril().bool(), persistent=False)

    def forward(self, tokens: Tensor, scale: float = 1.0, extra: Tensor | None = None) -> dict[str, Tensor]:
        x = self.embed(tokens) + self.place
        if extra is not None:
            x = x + extra
        q, k, v = self.query(self.first(x)).chunk(3, dim=-1)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, attn_mask=self.mask))
        x = x + self.down(F.gelu(self.up(self.second(x)))) * scale
        return {"logits": F.linear(x, self.embed.weight)}


class Shared(nn.Module):
    """One layer used twice and a weight transformed before use."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.inner, self.gain = nn.Linear(70, 9), nn.Linear(9, 9), nn.Parameter(torch.tensor(0.7))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first((x - 0.5) / 2))
        h = self.inner(torch.relu(self.inner(h)))
        return F.linear(h, self.first.weight[:3, :9] * self.gain)


class ReadTwice(nn.Module):
    """Values before a rectification, a sum and a normalisation are read again afterwards."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(70, 9), nn.Linear(9, 9), nn.Linear(9, 4)
        self.norm = nn.BatchNorm1d(9)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        h = self.second(torch.relu(h) + h)
        total = h + torch.relu(h)
        return self.third(self.norm(h) * total + h)


def normed_mlp() -> nn.Module:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(72, 9), nn.BatchNorm1d(9), nn.ReLU(), nn.Linear(9, 9), nn.BatchNorm1d(9), nn.ReLU(),
        nn.Linear(9, 4),
    )  # fmt: skip


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(5))


def labels(classes: int, *shape: int) -> Tensor:
    return torch.randint(classes, shape, generator=torch.Generator().manual_seed(6))


TOKENS = labels(11, 40, 5)
CASES: dict[str, tuple[Callable[[], nn.Module], Any, Tensor]] = {
    "mlp": (lambda: nn.Sequential(nn.Linear(70, 9), nn.ReLU(), nn.Linear(9, 4)), normal(40, 70), labels(4, 40)),
    "mlp with batch norm": (normed_mlp, normal(40, 8, 9), labels(4, 40)),
    "residual": (Residual, normal(40, 8, 6, 6), labels(4, 40)),
    "transformer": (Block, {"tokens": TOKENS, "scale": 0.3}, TOKENS.roll(-1, 1)),
    "read twice": (ReadTwice, normal(40, 70), labels(4, 40)),
    "shared": (Shared, normal(40, 70), labels(3, 40)),
    "resnet20": (
        lambda: reference_network("resnet20", width=1 / 4), normal(40, 3, 16, 16), labels(10, 40),
    ),
}  # fmt: skip


def pair(case: str, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, nn.Module, list[Any]]:
    factory, inputs, targets = CASES[case]
    a, b = (seeded(factory, seed).to(dtype) for seed in (0, 1))

    def part(rows: slice) -> Any:
        if isinstance(inputs, Tensor):
            return inputs[rows], targets[rows]
        cut = {k: v[rows] if isinstance(v, Tensor) else v for k, v in inputs.items()}
        return cut, targets[rows]

    return a, b, [part(slice(0, 23)), part(slice(23, 40))]


def plainly(monkeypatch: pytest.MonkeyPatch, *args: Any, **kwargs: Any) -> Any:
    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise ModelError("asked to run plainly")

    with monkeypatch.context() as patch:
        patch.setattr(_networks, "Engine", refuse)
        found = line(*args, **kwargs)
    assert found.settings["evaluation"] == "plain (asked to run plainly)"
    return found


def assert_same(found: Any, wanted: Any, tolerance: float) -> None:
    for name in ("loss", "lmc_error", "chord"):
        torch.testing.assert_close(
            getattr(found, name), getattr(wanted, name), rtol=tolerance, atol=tolerance
        )
    for name in ("barrier", "midpoint_loss", "ensemble_loss"):
        assert getattr(found, name) == pytest.approx(getattr(wanted, name), rel=tolerance, abs=tolerance)
    assert found.barrier_at == wanted.barrier_at
    torch.testing.assert_close(found.accuracy, wanted.accuracy, rtol=0, atol=1e-9)


@pytest.mark.filterwarnings("ignore:Running statistics inside the line")
@pytest.mark.parametrize("refresh", [None, "batchnorm", "function"])
@pytest.mark.parametrize("case", CASES)
def test_the_fast_way_is_the_plain_one(
    case: str, refresh: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b, data = pair(case)

    def doubled(state: Any) -> Any:
        return {k: v * 2 if v.is_floating_point() else v for k, v in state.items()}

    options = {"refresh": doubled if refresh == "function" else refresh, "points": 5, "bootstrap": 0}
    found = line(a, b, data, **options)  # type: ignore[arg-type]
    assert found.settings["evaluation"] == "traced"
    assert_same(found, plainly(monkeypatch, a, b, data, **options), 1e-12)
    # and with every size of pieces, of groups of scores, and without keeping anything
    for module, name, value in (
        (_engine, "PIECE_BYTES", 2**12),
        (_measure, "GROUP_BYTES", 0),
        (_networks, "KEPT_BYTES", 0),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, value)
            assert_same(line(a, b, data, **options), found, 1e-12)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", ["mlp with batch norm", "residual", "transformer"])
def test_other_dtypes(case: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b, data = pair(case, dtype)
    found, wanted = line(a, b, data, points=5), plainly(monkeypatch, a, b, data, points=5)
    assert found.settings["evaluation"] == "traced"
    tolerance = 40 * torch.finfo(dtype).eps
    for name in ("loss", "lmc_error"):
        torch.testing.assert_close(
            getattr(found, name), getattr(wanted, name), rtol=tolerance, atol=tolerance
        )


@pytest.mark.filterwarnings("ignore:Running statistics inside the line")
@pytest.mark.parametrize("traced", [True, False])
@pytest.mark.parametrize("case", ["mlp", "residual", "transformer"])
def test_bfloat16_products(case: str, traced: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b, data = pair(case, torch.float32)
    exact = line(a, b, data, points=5, refresh=None)
    measure = line if traced else lambda *args, **kwargs: plainly(monkeypatch, *args, **kwargs)
    found = measure(a, b, data, points=5, refresh=None, precision="bfloat16")
    assert found.settings["precision"] == "bfloat16"
    assert exact.settings["precision"] == "float32"
    assert not torch.equal(found.loss, exact.loss)
    torch.testing.assert_close(found.loss, exact.loss, rtol=0.03, atol=0.03)
    itself = measure(a, a, data, points=5, refresh=None, precision="bfloat16")
    assert (itself.barrier, itself.lmc_error_sup) == (0.0, 0.0)  # both ends and all points in one precision


def test_precision_is_checked() -> None:
    a, b, data = pair("mlp")
    with pytest.raises(
        DataError, match=r'"bfloat16" for a float32 network; found \'bfloat16\' for a network in'
    ):
        line(a, b, data, precision="bfloat16")
    with pytest.raises(DataError, match="found 'int8'"):
        line(a.float(), b.float(), data, precision="int8")
    low = line(a.bfloat16(), b.bfloat16(), data, precision="bfloat16")
    assert low.settings["precision"] == "bfloat16"


def test_layers_on_the_data_run_at_the_ends_only(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b, data = pair("mlp")
    lengths: list[int] = []
    original = F.linear

    def counted(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        lengths.append(weight.shape[1])
        return original(x, weight, bias)

    [site, *_] = [s for s in trace_steps(a, Batch((data[0][0],))).steps if isinstance(s, AffineStep)]
    assert (site.weight, site.length) == ("0.weight", 70)
    monkeypatch.setattr(_graph.F, "linear", counted)
    engine = Engine(a, Batch((data[0][0].double(),)))
    ends = engine.ready(state_of(a), end=True), engine.ready(state_of(b), end=True)
    ts = [0.25, 0.5, 0.75]
    outputs = list(
        engine.outputs(
            Batch((data[0][0].double(),)), ends, ts,
            lambda t: engine.ready(mixed(state_of(a), state_of(b), t, engine.names)),
        )
    )  # fmt: skip
    assert lengths.count(70) == 2
    assert lengths.count(9) == 4
    for t, f_t in zip(ts, outputs[1:], strict=True):
        wanted = bind(a, interpolate(a, b, t))(Batch((data[0][0],)))
        torch.testing.assert_close(f_t, wanted, rtol=1e-12, atol=1e-12)
    assert "0.weight" not in engine.names


class Branching(nn.Module):
    """Its path depends on the values, so a trace cannot follow it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(70, 4), nn.Linear(70, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.first(x) if float(x.sum()) > 0 else self.second(x)


class Baked(nn.Module):
    """Computes with a weight that tracing takes for a constant."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.gain = nn.Linear(70, 4), nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * self._parameters["gain"].exp()  # type: ignore[union-attr]


class OverTheBatch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(70, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x - x.mean(0))


class Overwriting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(70, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = x * 2
        y.sub_(1)
        return self.linear(y)


def hooked() -> nn.Module:
    model = nn.Sequential(nn.Linear(70, 4))
    model[0].register_forward_hook(lambda module, inputs, output: output * 2)
    return model


@pytest.mark.parametrize(
    ("factory", "reason"),
    [
        (Branching, "Cannot trace Branching: TraceError|Cannot trace Branching: TypeError"),
        (Baked, "computes something from its weights that a trace would keep"),
        (OverTheBatch, "its trace computes something else"),
        (Overwriting, "'sub_' overwrites a value"),
        (hooked, "0 has forward hooks"),
    ],
)
def test_what_cannot_be_traced_runs_plainly(
    factory: Any, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = (seeded(factory, seed).double() for seed in (0, 1))
    data = [(normal(40, 70), labels(4, 40))]
    for model in (a, b):
        before = {k: id(v) for k, v in vars(model).items()}
        found = line(a, b, data, points=3)
        assert {k: id(v) for k, v in vars(model).items()} == before

    assert re.search(reason, found.settings["evaluation"])
    (shown,) = re.findall(r"evaluation plain \(([^()]+)\), ", str(found))
    assert len(shown) <= 60
    assert found.settings["evaluation"].startswith(f"plain ({shown.removesuffix(' …')}")
    assert found.settings["evaluation"].startswith("plain (")
    wanted = bind(a, interpolate(a, b, 0.5))(Batch((data[0][0],)))
    loss = F.cross_entropy(wanted, data[0][1])
    assert found.midpoint_loss == pytest.approx(float(loss), rel=1e-12)


def test_constants_stay_out_of_the_module() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(70, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x) * torch.tensor([1.0, 2.0, 3.0, 4.0])

    a, b = seeded(Scaled, 0), seeded(Scaled, 1)
    names = set(vars(a))
    assert line(a, b, [(normal(8, 70), labels(4, 8))], points=3).settings["evaluation"] == "traced"
    assert set(vars(a)) == names


def test_batches_of_another_form_run_plainly() -> None:
    a, b, data = pair("transformer")
    other = ({**data[1][0], "extra": normal(17, 5, 8).double()}, data[1][1])
    found = line(a, b, [data[0], other], points=3, loss="cross_entropy")
    parts = [line(a, b, [d], points=3) for d in (data[0], other)]
    wanted = (23 * parts[0].midpoint_loss + 17 * parts[1].midpoint_loss) / 40
    assert found.midpoint_loss == pytest.approx(wanted, rel=1e-12)


def test_mixed_states_are_the_interpolated_ones() -> None:
    a, b = (
        {"w": torch.randn(50, generator=torch.Generator().manual_seed(k)), "n": torch.tensor(k)}
        for k in (1, 2)
    )
    for t in (0.0, 0.3, 0.9, 1.0):
        torch.testing.assert_close(mixed(a, b, t, a)["w"], interpolate(a, b, t)["w"], rtol=0, atol=4.8e-7)
    assert torch.equal(mixed(a, b, 0.0, a)["w"], a["w"])
    assert torch.equal(mixed(a, b, 1.0, a)["w"], b["w"])
    assert mixed(a, b, 0.7, ["n"]) == {"n": torch.tensor(1)}
    half = {k: v.bfloat16() for k, v in a.items()}
    assert torch.equal(mixed(half, half, 0.3, ["w"])["w"], half["w"])


# --- adaptive points ---------------------------------------------------------------------------------------


def curve(function: Callable[[Tensor], Tensor], ts: Tensor) -> Tensor:
    return function(ts.double())


SMOOTH = {
    "hump": lambda t: (math.pi * t).sin() ** 2,
    "narrow hump off the centre": lambda t: torch.exp(-(((t - 0.37) / 0.12) ** 2)),
    "tilted": lambda t: 4 * t * (1 - t) + 3 * t,
    "two humps": lambda t: (2 * math.pi * t).sin() ** 2 * (1 + 0.2 * t),
}


@pytest.mark.parametrize("name", SMOOTH)
@pytest.mark.parametrize("lipschitz", [None, 12.0])
def test_the_search_finds_the_top_within_its_tolerance(name: str, lipschitz: float | None) -> None:
    function, tolerance = SMOOTH[name], 2e-2 if lipschitz else 2e-3
    fine = torch.linspace(0, 1, 10001).double()
    truth = float((function(fine) - torch.lerp(function(fine)[:1], function(fine)[-1:], fine)).max())
    ts = torch.linspace(0, 1, 7).double()
    for _ in range(100):
        more = next_points(function(ts), ts, lipschitz, tolerance)
        if not more:
            break
        ts = torch.tensor(sorted({*ts.tolist(), *more})).double()
    losses = function(ts)
    found = ceiling(losses, ts, lipschitz)
    assert found is not None
    rises = losses - torch.lerp(losses[:1], losses[-1:], ts)
    assert truth - float(rises.max()) <= tolerance
    assert float(found.heights.max() - rises.max()) <= tolerance
    assert len(ts) < (200 if lipschitz else 20)


def test_a_lipschitz_ceiling_by_hand_is_a_bound() -> None:
    ts = torch.tensor([0.0, 0.5, 1.0]).double()
    found = ceiling(torch.tensor([1.0, 2.0, 1.0]).double(), ts, 4.0)
    assert found is not None
    assert found.heights.tolist() == [1.5, 1.5]  # (0 + 1 + 4 / 2) / 2
    assert found.at.tolist() == [0.375, 0.625]
    assert ceiling(torch.zeros(3).double(), ts, None) is None


def test_adaptive_lines() -> None:
    a, b, data = pair("mlp")
    labelled = [(x, a(x.double()).argmax(1)) for x, _ in data]
    fine = line(a, b, labelled, points=201, bootstrap=0)
    found = line(a, b, {"x": labelled, "y": iter(data)}, points="adaptive", tolerance=1e-4, bootstrap=0)
    assert found.barrier_uncertainty is not None
    assert found.barrier_uncertainty <= 1e-4
    assert abs(found.barrier - fine.barrier) <= 1e-4
    assert 7 <= len(found.ts) < 30
    assert found.settings["points"] == f"adaptive ({len(found.ts)})"
    assert 0.5 in found.ts.tolist()
    assert torch.equal(found.curves["y"].ts, found.ts)
    given = line(a, b, labelled, points=found.ts, bootstrap=0)
    torch.testing.assert_close(given.loss, found.loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(given.lmc_error, found.lmc_error, rtol=1e-12, atol=1e-14)


def test_adaptive_points_stop_at_fifty_one(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b, data = pair("mlp")
    monkeypatch.setattr(_measure, "ENDS_BYTES", 0)
    found = line(a, b, data, points="adaptive", lipschitz=1e4, bootstrap=0)
    assert len(found.ts) == 51
    assert found.barrier_uncertainty is not None
    assert found.barrier_uncertainty > 1
    assert found.settings["uncertainty"] == "bound for slope 10000"
    assert line(a, b, data, points=3).barrier_uncertainty is None
    with pytest.raises(DataError, match="positions or \"adaptive\", found 'even'"):
        line(a, b, data, points="even")
    with pytest.raises(DataError, match=r"expected tolerance above 0, found 0\.0"):
        line(a, b, data, tolerance=0.0)
    with pytest.raises(DataError, match=r"expected lipschitz above 0, found -1\.0"):
        line(a, b, data, lipschitz=-1.0)
