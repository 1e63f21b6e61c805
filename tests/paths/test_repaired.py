"""REPAIR: at interior points every channel has the interpolated mean and deviation, and nothing else is touched."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import isthmus
from isthmus import Refreshed, Repaired, Straight, line_along
from isthmus.errors import DataError, IsthmusWarning, ModelError
from isthmus.evaluation import evaluate
from isthmus.states import State, state_of
from isthmus.study import TrainSettings, load_dataset, network_for, to_batches, train
from isthmus.testing import randomise_state, reference_network


def seeded(factory: Callable[[], nn.Module], seed: int, dtype: torch.dtype = torch.float32) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = factory()
    model = randomise_state(model, torch.Generator().manual_seed(seed)).eval()
    return model if dtype == torch.float32 else model.to(dtype)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) + 0.3


def mlp() -> nn.Module:
    return nn.Sequential(
        nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 7), nn.Tanh(), nn.Linear(7, 6), nn.ReLU(), nn.Linear(6, 3)
    )


class Residual(nn.Module):
    """Images, a shortcut, in-place rectification, groups, and a transposed convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1, groups=2)
        self.up, self.head = nn.ConvTranspose2d(6, 5, 2, stride=2), nn.Linear(5, 4)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        h = self.act(self.stem(x))
        h = h + F.gelu(self.body(h))
        return {"logits": self.head(torch.relu(self.up(h)).mean((2, 3)))}


class Normed(nn.Module):
    """Normalisations of every kind behind layers without a bias, and one BatchNorm before any layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.BatchNorm2d(3)
        self.a, self.a_norm = nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6)
        self.b, self.b_norm = nn.Conv2d(6, 6, 1, bias=False), nn.GroupNorm(2, 6)
        self.c, self.c_norm = nn.Conv2d(6, 4, 1, bias=False), nn.InstanceNorm2d(4, affine=True)
        self.d, self.d_norm = nn.Linear(4, 8, bias=False), nn.LayerNorm(8)
        self.free, self.head = nn.LayerNorm(8), nn.Linear(8, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.a_norm(self.a(self.first(x))))
        h = torch.relu(self.b_norm(self.b(h)))
        h = torch.relu(self.c_norm(self.c(h))).square().mean((2, 3))
        h = torch.relu(self.d_norm(self.d(h)))
        return self.head(self.free(h))


CASES: dict[str, tuple[Callable[[], nn.Module], Tensor, tuple[str, ...]]] = {
    "mlp": (mlp, normal(60, 5), ("0", "2", "4")),
    "residual": (Residual, normal(40, 3, 5, 5), ("stem", "body", "up")),
    "normed": (Normed, normal(40, 3, 6, 6), ("first", "a_norm", "b_norm", "c_norm", "d_norm")),
}


def measured(
    model: nn.Module, state: State, layers: tuple[str, ...], inputs: Tensor
) -> dict[str, list[Tensor]]:
    """Return mean and deviation of every channel by running the module itself on all data at once."""
    kept: dict[str, Tensor] = {}
    other = seeded(lambda: type(model)() if not isinstance(model, nn.Sequential) else mlp(), 0).to(
        inputs.dtype
    )
    other.load_state_dict(state)
    for name in layers:
        hook = lambda _m, _i, out, name=name: kept.update({name: out.detach().clone()})  # noqa: E731
        other.get_submodule(name).register_forward_hook(hook)
    with torch.no_grad():
        other(inputs)
    found = {}
    for name, output in kept.items():
        rows = output.double()
        rows = (rows.movedim(1, 0) if rows.ndim == 4 else rows.T).flatten(1)
        found[name] = [rows.mean(1), rows.std(1, correction=0)]
    return found


def cut(inputs: Tensor) -> list[Tensor]:
    """Uneven batches, one of a single example."""
    return list(inputs.split([len(inputs) // 2, 1, len(inputs) - len(inputs) // 2 - 1]))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("t", [0.25, 0.5])
def test_every_channel_has_the_interpolated_mean_and_deviation(case: str, t: float) -> None:
    factory, inputs, layers = CASES[case]
    a, b = (seeded(factory, seed) for seed in (0, 1))
    straight = Straight(a, b)
    path = Repaired(straight, a, iter(cut(inputs)))
    assert path.layers == layers
    found = measured(a, path.at(t), layers, inputs)
    mixed = measured(a, straight.at(t), layers, inputs)
    ends = [measured(a, end, layers, inputs) for end in path.ends]
    gaps = []
    for name in layers:
        for k in (0, 1):
            goal = torch.lerp(ends[0][name][k], ends[1][name][k], t)
            torch.testing.assert_close(found[name][k], goal, rtol=1e-5, atol=1e-5)
            gaps.append(float((mixed[name][k] - goal).abs().max()))
        told = path.statistics(path.at(t))[name]
        for one, other in zip(told, found[name], strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    assert max(gaps) > 0.01  # the mix alone is far off


def test_each_sweep_makes_one_more_layer_exact() -> None:
    """One sweep that corrects, then one that measures for each layer; what comes in one batch is exact at once."""
    passes: list[int] = []

    class Counted(list[Tensor]):
        def __iter__(self) -> Iterator[Tensor]:
            passes.append(1)
            return super().__iter__()

    a, b = (seeded(mlp, seed, torch.float64) for seed in (0, 1))
    inputs = normal(60, 5).double()
    for parts, layers, count in (
        (inputs.split([30, 20, 10]), None, 4),
        (inputs.split([30, 20, 10]), ["0"], 2),
        ([inputs], None, 2),
    ):
        path = Repaired(Straight(a, b), a, Counted(parts), layers=layers)
        passes.clear()
        path.at(0.5)
        assert len(passes) == count


def test_in_double_precision_the_tolerance_can_be_that_of_rounding() -> None:
    a, b = (seeded(mlp, seed, torch.float64) for seed in (0, 1))
    inputs = normal(60, 5).double()
    path = Repaired(Straight(a, b), a, cut(inputs), tolerance=1e-12)
    ends, found = [path.statistics(end) for end in path.ends], path.statistics(path.at(0.7))
    for name in path.layers:
        for k in (0, 1):
            goal = torch.lerp(ends[0][name][k], ends[1][name][k], 0.7)
            torch.testing.assert_close(found[name][k], goal, rtol=0, atol=1e-11)


def test_one_layer_by_hand() -> None:
    # pre-activations of A: x, of B: -2x + 3; over x = (0, 2) the middle -x/2 + 1.5 has mean 1 and deviation .5, and is
    # given (1 + 1) / 2 = 1 and (1 + 2) / 2 = 1.5: three times as steep, -1.5 x + 2.5
    def states(weight: float, bias: float) -> State:
        ones = torch.ones(1, 1)
        return {
            "0.weight": weight * ones,
            "0.bias": torch.tensor([bias]),
            "1.weight": ones,
            "1.bias": ones[0],
        }

    model = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1)).eval()
    found = Repaired(Straight(states(1.0, 0.0), states(-2.0, 3.0)), model, [torch.tensor([[0.0], [2.0]])]).at(
        0.5
    )
    assert float(found["0.weight"]) == pytest.approx(-1.5)
    assert float(found["0.bias"]) == pytest.approx(2.5)
    assert float(found["1.weight"]) == float(found["1.bias"]) == 1.0


@pytest.mark.parametrize("case", CASES)
def test_the_ends_stay_and_nothing_else_changes(case: str) -> None:
    factory, inputs, _ = CASES[case]
    a, b = (seeded(factory, seed) for seed in (0, 1))
    before = [t.clone() for m in (a, b) for t in m.state_dict().values()] + [inputs.clone()]
    straight = Straight(a, b)
    path = Repaired(straight, a, cut(inputs))
    for t, end in ((0.0, a), (1, b)):
        assert all(
            torch.equal(v, path.at(t)[k]) for k, v in end.state_dict().items() if v.is_floating_point()
        )
    middle, plain = path.at(0.5), straight.at(0.5)
    changed = {k for k, v in middle.items() if not torch.equal(v, plain[k])}
    assert changed == {f"{name}.{leaf}" for name in path.layers for leaf in ("weight", "bias")}
    assert set(plain) - set(path.straight) >= changed
    assert all(v.dtype == plain[k].dtype and v.shape == plain[k].shape for k, v in middle.items())
    after = [t for m in (a, b) for t in m.state_dict().values()] + [inputs]
    assert all(torch.equal(x, y) for x, y in zip(before, after, strict=True))
    assert not any(m._forward_hooks for m in a.modules())
    assert all(torch.equal(v, path.at(0.5)[k]) for k, v in middle.items())  # the same again


def test_a_repaired_path_is_measured_as_its_states_are() -> None:
    a, b, inputs = seeded(mlp, 0), seeded(mlp, 1), normal(60, 5)
    data = [(inputs, torch.arange(60) % 3)]
    path = Repaired(Straight(a, b), a, data)
    found = line_along(path, a, data, points=3)
    assert found.settings["evaluation"] == "traced"
    assert found.settings["path"] == "Repaired(Straight)"
    assert found.midpoint_loss == pytest.approx(evaluate(a, data, state=path.at(0.5)).loss, rel=1e-5)


def test_a_network_between_itself_is_itself() -> None:
    a, inputs = seeded(Residual, 0), normal(20, 3, 5, 5)
    found = Repaired(Straight(a, a), a, [inputs]).at(0.5)
    for name, value in a.state_dict().items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6)


def test_what_is_repaired_may_be_chosen() -> None:
    a, b, inputs = seeded(mlp, 0), seeded(mlp, 1), normal(60, 5)
    path = Repaired(Straight(a, b), a, [inputs], layers=["6", "0", "6"])
    assert path.layers == ("0", "6")
    ends, found = [path.statistics(end) for end in path.ends], path.statistics(path.at(0.5))
    torch.testing.assert_close(found["6"][1], (ends[0]["6"][1] + ends[1]["6"][1]) / 2, rtol=1e-5, atol=1e-5)
    assert torch.equal(path.at(0.5)["2.weight"], isthmus.interpolate(a, b, 0.5)["2.weight"])


def test_batch_norm_needs_no_refresh_and_no_note() -> None:
    """Running statistics are wrong by a factor and a shift of each channel, which the repair of the layer undoes."""
    g = torch.Generator().manual_seed(0)
    a, b = (randomise_state(reference_network("resnet20", width=1 / 4), g).eval() for _ in range(2))
    data = [(torch.randn(30, 3, 8, 8, generator=g), torch.randint(10, (30,), generator=g))]
    path = Repaired(Straight(a, b), a, data)
    found = line_along(path, a, data, points=3)
    assert [note for note in found.notes if "unning statistics" in note] == []
    again = Repaired(Refreshed.batchnorm(Straight(a, b), a, data), a, data).at(0.5)
    wanted = evaluate(a, data, state=again).loss
    assert found.midpoint_loss == pytest.approx(wanted, rel=1e-3)


# --- What cannot be held ----------------------------------------------------------------------------------------


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(5, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.inner(torch.relu(self.inner(x)))))


class ByHand(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(5, 6), nn.Parameter(torch.randn(3, 6))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(torch.relu(self.first(x)), self.second)


class Unused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.spare, self.head = nn.Linear(5, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.first(x)))


class Complex(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(5, 6, dtype=torch.complex64), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x.to(torch.complex64)).real)


class Doubled(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


def tied() -> nn.Module:
    model = nn.Sequential(nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, 3))
    model[2].weight = model[0].weight
    return model


def hooked() -> nn.Module:
    model = mlp()
    model.get_submodule("2").register_forward_hook(lambda _m, _i, out: out + 1)
    return model


def normalised() -> nn.Module:
    return nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(5, 6)), nn.ReLU(), nn.Linear(6, 3))


REFUSED: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], str]] = {
    "no bias": (
        lambda: nn.Sequential(nn.Linear(5, 6, bias=False), nn.ReLU(), nn.Linear(6, 3)), (5,),
        "'0' has no bias, so that its mean cannot be set",
    ),
    "norm without gain": (
        lambda: nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6, affine=False), nn.ReLU(), nn.Linear(6, 3)), (5,),
        "'1' has no weight of its own",
    ),
    "run twice": (Twice, (5,), "'inner' is run 2 times"),
    "by hand": (ByHand, (5,), "'second' of a ByHand is applied where its outputs cannot be seen"),
    "unused": (Unused, (5,), "'spare.weight' of a Linear is applied where .* or not at all"),
    "own forward": (
        lambda: nn.Sequential(Doubled(5, 6), nn.ReLU(), nn.Linear(6, 3)), (5,), "'0' has a forward or hooks of its own",
    ),
    "complex": (
        Complex, (5,),
        "'first' has a weight or bias that is no real floating number",
    ),
    "tied": (tied, (5,), "'0' shares its weight or bias with another layer; '2' shares"),
    "hooked": (hooked, (5,), "'2' has a forward or hooks of its own"),
    "parametrised": (normalised, (5,), "of a .* is applied where its outputs|'0' has no weight of its own"),
    "grouped and turned": (
        lambda: nn.Sequential(nn.ConvTranspose1d(4, 4, 2, groups=2), nn.Flatten(), nn.Linear(24, 3)), (4, 5),
        "'0' is a grouped transposed convolution",
    ),
    "several axes": (
        lambda: nn.Sequential(nn.Linear(5, 6), nn.LayerNorm((4, 6)), nn.Flatten(), nn.Linear(24, 3)), (4, 5),
        "'1' normalises several axes at once",
    ),
    "attention": (
        lambda: nn.TransformerEncoderLayer(4, 2, 8, batch_first=True), (3, 4),
        "in_proj_weight' of a MultiheadAttention",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_held_is_refused_by_name(case: str) -> None:
    factory, shape, text = REFUSED[case]
    a = seeded(factory, 0)
    with pytest.raises(ModelError, match=rf"Repairing: .*{text}.*layers=\[\.\.\.\]"):
        Repaired(Straight(a, a), a, [normal(8, *shape)])


def test_examples_without_an_axis_of_their_own() -> None:
    """Convolutions and instance normalisation also run on a single image, whose first axis lists the channels."""

    def factory() -> nn.Module:
        return nn.Sequential(
            nn.Conv1d(3, 4, 2), nn.ReLU(), nn.Conv1d(4, 4, 1), nn.InstanceNorm1d(4, affine=True), nn.ReLU(),
            nn.Flatten(0), nn.Linear(16, 2),
        )  # fmt: skip

    a, b = seeded(factory, 0), seeded(factory, 1)
    path = Repaired(Straight(a, b), a, [normal(3, 5, seed=1), normal(3, 5, seed=2)])
    assert path.layers == ("0", "3")
    ends, found = [path.statistics(end) for end in path.ends], path.statistics(path.at(0.5))
    for name in path.layers:
        assert found[name][0].shape == (4,)
        for k in (0, 1):
            goal = (ends[0][name][k] + ends[1][name][k]) / 2
            torch.testing.assert_close(found[name][k], goal, rtol=1e-5, atol=1e-5)


def test_more_than_three_are_counted() -> None:
    layers = [layer for _ in range(5) for layer in (nn.Linear(5, 5, bias=False), nn.ReLU())]
    a = seeded(lambda: nn.Sequential(*layers, nn.Linear(5, 3)), 0)
    with pytest.raises(
        ModelError, match=r"'4' has no bias, so that its mean cannot be set; and 2 more\. Name"
    ):
        Repaired(Straight(a, a), a, [normal(8, 5)])


@pytest.mark.parametrize(
    ("layers", "error", "text"),
    [
        (["nothing"], DataError, "has no module 'nothing'"),
        (["1"], ModelError, "'1' is a ReLU, neither a linear layer"),
        ([], DataError, "no layer to hold was found"),
    ],
)
def test_names_that_hold_nothing(layers: list[str], error: type[Exception], text: str) -> None:
    a = seeded(mlp, 0)
    with pytest.raises(error, match=text):
        Repaired(Straight(a, a), a, [normal(8, 5)], layers=layers)


def test_a_layer_that_is_not_run_is_not_held() -> None:
    a = seeded(Unused, 0)
    with pytest.raises(ModelError, match="'spare' is not run"):
        Repaired(Straight(a, a), a, [normal(8, 5)], layers=["spare"])
    assert Repaired(Straight(a, a), a, [normal(8, 5)], layers=["first"]).layers == ("first",)


def test_a_channel_that_is_lost_is_refused() -> None:
    """The weights of the two ends cancel in the middle: no factor brings the spread back."""
    a = seeded(mlp, 0)
    opposed = {k: -v if k == "0.weight" else v for k, v in state_of(a).items()}
    path = Repaired(Straight(a, opposed), a, [normal(60, 5)])
    with pytest.raises(
        ModelError, match=r"at t = 0\.5: 8 of 8 channels of '0' never vary there, though they do"
    ):
        path.at(0.5)
    assert path.at(0.25)["0.weight"].isfinite().all()


def test_channels_that_never_vary_at_the_ends_are_shifted_only() -> None:
    a, b = seeded(mlp, 0), seeded(mlp, 1)
    states = [{k: v * (0 if k == "0.weight" else 1) for k, v in state_of(m).items()} for m in (a, b)]
    path = Repaired(Straight(*states), a, [normal(60, 5)])
    found, ends = path.statistics(path.at(0.5)), [path.statistics(end) for end in path.ends]
    for name in path.layers:
        assert float(found[name][1].max()) < 1e-6
        goal = (ends[0][name][0] + ends[1][name][0]) / 2
        torch.testing.assert_close(found[name][0], goal, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("dtype", "near"), [(torch.float64, 1e-11), (torch.float32, 16 * 2.0**-23)], ids=str)
def test_a_layer_that_hardly_varies_is_held_as_far_as_rounding_lets_it(
    dtype: torch.dtype, near: float
) -> None:
    """Its outputs are about 1 and vary by 1e-6: double precision holds that, single rounds each by a part of it."""
    states = []
    for seed in (0, 1):
        state = state_of(seeded(mlp, seed, torch.float64))
        state["2.weight"] = 1e-5 * state["2.weight"]
        state["2.bias"] = 1 + state["2.bias"]
        states.append({k: v.to(dtype) for k, v in state.items()})
    model, inputs = seeded(mlp, 0, dtype), normal(60, 5).to(dtype)
    path = Repaired(Straight(*states), model, cut(inputs))
    found, ends = path.statistics(path.at(0.5)), [path.statistics(end) for end in path.ends]
    goal = (ends[0]["2"][1] + ends[1]["2"][1]) / 2
    assert float(goal.max()) < 1e-5
    torch.testing.assert_close(found["2"][1], goal, rtol=0, atol=near)


def test_further_bad_input() -> None:
    a = seeded(mlp, 0)
    straight = Straight(a, a)
    with pytest.raises(DataError, match=r"expected t from 0 to 1, found 1\.5"):
        Repaired(straight, a, [normal(8, 5)]).at(1.5)
    with pytest.raises(DataError, match="expected a tolerance above 0, found 0"):
        Repaired(straight, a, [normal(8, 5)], tolerance=0)
    with pytest.raises(DataError, match="at least one batch"):
        Repaired(straight, a, [])
    with pytest.raises(DataError, match="at t = 0: NaN or infinite outputs of '0'"):
        Repaired(straight, a, [torch.full((4, 5), float("inf"))])
    with pytest.raises(ModelError, match="in training mode"):
        Repaired(straight, nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Linear(6, 3)), [normal(8, 5)])


def test_batches_that_differ_each_time_are_found_out() -> None:
    class Drawn:
        def __init__(self) -> None:
            self.generator = torch.Generator().manual_seed(0)

        def __iter__(self) -> Iterator[Tensor]:
            yield torch.randn(6, 5, generator=self.generator)

    a, b = seeded(mlp, 0), seeded(mlp, 1)
    with pytest.raises(
        ModelError, match=r"the statistics of '\d' stay .* are the batches drawn anew each time"
    ):
        Repaired(Straight(a, b), a, Drawn()).at(0.5)


# --- What it is for ---------------------------------------------------------------------------------------------


def images() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 24, 3, padding=1, stride=2), nn.ReLU(),
        nn.Flatten(), nn.Linear(24 * 16, 10),
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["mlp", pytest.param("cnn", marks=pytest.mark.slow)])
def test_the_barrier_between_trained_networks_falls(kind: str) -> None:
    digits = load_dataset("digits")
    data = to_batches(digits)

    def trained(seed: int) -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = images() if kind == "cnn" else network_for("mlp", digits, width=64, depth=3)
        how = TrainSettings(learning_rate=0.05, batch_size=64, epochs=8, seed=seed)
        return train(model, digits, how).model.eval()

    a, b = trained(0), trained(1)
    for method in (None, "weights"):
        end: Any = (
            b if method is None else isthmus.align(a, b, batches=data, method=method).apply(state_of(b))
        )
        straight = Straight(a, end)
        before = line_along(straight, a, data, points=5)
        after = line_along(Repaired(straight, a, data), a, data, points=5)
        assert before.barrier > 0.05
        assert after.barrier < 0.6 * before.barrier  # seen: .2 to .5 of it
        assert after.midpoint_accuracy > before.midpoint_accuracy  # type: ignore[operator]


def test_note_on_layers_that_cannot_be_recomputed() -> None:
    class Home(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(5, 6), nn.Linear(6, 3)
            self.register_buffer("running_mean", torch.randn(6))

        def forward(self, x: Tensor) -> Tensor:
            return self.second(torch.relu(self.first(x) - self.running_mean))

    a, b, data = seeded(Home, 0), seeded(Home, 1), [(normal(30, 5), torch.arange(30) % 3)]
    with pytest.warns(IsthmusWarning, match="Running statistics inside the line"):
        line_along(Repaired(Straight(a, b), a, data), a, data, points=3)
