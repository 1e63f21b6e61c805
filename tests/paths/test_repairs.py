"""Repairs of mixed networks: each does what it says, is written into a plain state, and is chosen by the loss."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import isthmus
from isthmus import Refreshed, Repaired, Straight, line, merge
from isthmus.errors import DataError, IsthmusWarning, ModelError
from isthmus.evaluation import evaluate
from isthmus.merging import merged
from isthmus.paths import REPAIRS, check_repair, repair_of
from isthmus.states import State, state_of
from isthmus.study import TrainSettings, load_dataset, to_batches, train
from isthmus.testing import mlp as perceptron
from isthmus.testing import randomise_state

Factory = Callable[[], nn.Module]
pytestmark = pytest.mark.filterwarnings("ignore:The weights of:isthmus.errors.IsthmusWarning")


def seeded(factory: Factory, seed: int) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = factory()
    return randomise_state(model, torch.Generator().manual_seed(seed)).eval().double()


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double() + 0.3


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 7), nn.Tanh(), nn.Linear(7, 3))


def without_bias() -> nn.Module:
    return nn.Sequential(
        nn.Linear(5, 8, bias=False), nn.ReLU(), nn.Linear(8, 7, bias=False), nn.ReLU(), nn.Linear(7, 3)
    )


def normed() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 6, 2, bias=False), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 5, 2), nn.GroupNorm(1, 5),
        nn.ReLU(), nn.Flatten(), nn.Linear(20, 3),
    )  # fmt: skip


def learnt(a: nn.Module, b: nn.Module, shape: tuple[int, ...] = (5,)) -> list[tuple[Tensor, Tensor]]:
    """Return data of which the mix of two networks is mostly right."""
    mix, inputs = Straight(a, b).at(0.5), normal(60, *shape)
    with torch.no_grad():
        outputs = torch.func.functional_call(a, mix, (inputs,))
    noise = torch.randn(outputs.shape, generator=torch.Generator().manual_seed(1)).double()
    labels = (outputs + 2 * outputs.std() * noise).argmax(1)
    return [(inputs[:30], labels[:30]), (inputs[30:], labels[30:])]


def examples(shape: tuple[int, ...] = (5,), count: int = 60) -> list[tuple[Tensor, Tensor]]:
    inputs, labels = normal(count, *shape), torch.arange(count) % 3
    return [(inputs[: count // 2], labels[: count // 2]), (inputs[count // 2 :], labels[count // 2 :])]


def close(found: Tensor, goal: Tensor, error: float = 1e-9) -> None:
    torch.testing.assert_close(found, goal, rtol=0, atol=error)


CASES: dict[str, tuple[Factory, tuple[int, ...]]] = {
    "mlp": (mlp, (5,)),
    "without bias": (without_bias, (5,)),
    "normed": (normed, (3, 4, 4)),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("t", [0.3, 0.5])
def test_rescale_holds_every_deviation_by_a_factor_alone(case: str, t: float) -> None:
    factory, shape = CASES[case]
    a, b, data = seeded(factory, 0), seeded(factory, 1), examples(shape)
    straight = Straight(a, b)
    path = Repaired(straight, a, data, hold="deviation", tolerance=1e-12)
    found, ends = path.statistics(path.at(t)), [path.statistics(end) for end in path.ends]
    mixed = path.statistics(straight.at(t))
    gap = 0.0
    for name in path.layers:
        goal = torch.lerp(ends[0][name][1], ends[1][name][1], t)
        close(found[name][1], goal)
        gap = max(gap, float((mixed[name][1] - goal).abs().max()))
    assert gap > 0.01
    first = path.layers[
        0
    ]  # nothing before it is changed, so that its outputs are the mixed ones times a factor
    factor = found[first][1] / mixed[first][1]
    close(found[first][0], factor * mixed[first][0])


def test_rescale_leaves_running_statistics_to_be_recomputed() -> None:
    a, b, data = seeded(normed, 0), seeded(normed, 1), examples((3, 4, 4))
    scaled = Repaired(Straight(a, b), a, data, hold="deviation")
    assert "1.running_mean" in scaled.straight
    assert "1.running_mean" not in Repaired(Straight(a, b), a, data).straight


# --- Without data -----------------------------------------------------------------------------------------------


def repaired(
    name: str, a: nn.Module, b: nn.Module, data: list[tuple[Tensor, Tensor]] | None, t: float
) -> State:
    straight = Straight(a, b)
    shown = None if data is not None else isthmus.Batch((normal(2, 5),))
    made = repair_of(name, a, straight.ends, data, mix=lambda: (straight.at(t), (1 - t, t)), example=shown)
    return made.on_path(straight.at(t), t)


def test_from_weights_alone_their_norms_are_mixed() -> None:
    a, b, t = seeded(mlp, 0), seeded(mlp, 1), 0.3
    found, plain = repaired("data-free", a, b, None, t), Straight(a, b).at(t)
    for name in ("0.weight", "2.weight"):
        norms = [state_of(m)[name].norm(dim=1) for m in (a, b)]
        close(found[name].norm(dim=1), torch.lerp(*norms, t))
        assert float((plain[name].norm(dim=1) - found[name].norm(dim=1)).abs().max()) > 0.01
    for name in ("0.bias", "2.bias", "4.weight", "4.bias"):
        assert torch.equal(found[name], plain[name])


def test_from_weights_alone_running_variances_are_exact_where_inputs_are_white() -> None:
    """With uncorrelated inputs of one size the cosine of two units' weights is the correlation of their outputs."""

    def factory() -> nn.Module:
        return nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))

    white = (
        torch.linalg.qr(torch.cat([torch.ones(40, 1), torch.randn(40, 5)], 1).double())[0][:, 1:] * 40**0.5
    )
    ends = []
    for seed in (0, 1):
        model = seeded(factory, seed)
        outputs = model[0](white)
        model[1].running_var.copy_(outputs.var(0, correction=0).detach())
        ends.append(model)
    data = [(white, torch.arange(40) % 3)]
    found = repaired("data-free", *ends, data, 0.3)
    mixed = Straight(*ends).at(0.3)
    outputs = F.linear(white, mixed["0.weight"], mixed["0.bias"])
    close(found["1.running_var"], outputs.var(0, correction=0))
    assert torch.equal(found["0.weight"], mixed["0.weight"])


def test_random_inputs_stand_for_data() -> None:
    a, b = seeded(mlp, 0), seeded(mlp, 1)
    found = repaired("noise", a, b, None, 0.5)
    generator = torch.Generator().manual_seed(0)
    noise = torch.cat([torch.randn(256, 5, generator=generator) for _ in range(4)]).double()
    path = Repaired(Straight(a, b), a, [noise])
    torch.testing.assert_close(found["0.weight"], path.at(0.5)["0.weight"], rtol=1e-5, atol=1e-6)
    assert all(torch.equal(v, repaired("noise", a, b, None, 0.5)[k]) for k, v in found.items())


# --- Temperature ------------------------------------------------------------------------------------------------


def test_a_temperature_is_the_best_and_nothing_else_changes() -> None:
    a, b = seeded(mlp, 0), seeded(mlp, 1)
    data = learnt(a, b)
    plain, found = Straight(a, b).at(0.5), repaired("temperature", a, b, data, 0.5)
    inputs, labels = (torch.cat([batch[k] for batch in data]) for k in (0, 1))
    model = seeded(mlp, 2)
    model.load_state_dict(plain)
    logits = model(inputs).detach()
    model.load_state_dict(found)
    cooled = model(inputs).detach()
    temperature = float((logits / cooled).mean())
    close(cooled, logits / temperature)
    losses = [float(F.cross_entropy(logits / (temperature * f), labels)) for f in (1, 0.999, 1.001)]
    assert losses[0] < min(losses[1:])
    assert abs(temperature - 1) > 0.01
    assert {k for k in plain if not torch.equal(plain[k], found[k])} == {"4.weight", "4.bias"}


def test_a_planted_temperature_is_found() -> None:
    a = seeded(mlp, 0)
    data = learnt(a, a)
    states = [state_of(a), {k: v * (5 if k.startswith("4") else 1) for k, v in state_of(a).items()}]
    found = [repaired("temperature", *_loaded(mlp, [s, s]), data, 0.5) for s in states]
    close(found[0]["4.weight"], found[1]["4.weight"], 1e-7)


def _loaded(factory: Factory, states: list[State]) -> list[nn.Module]:
    models = []
    for state in states:
        models.append(seeded(factory, 0))
        models[-1].load_state_dict(state)
    return models


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(3, 4), nn.Linear(4, 3, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.table(ids)))


class InPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x).tanh_()


@pytest.mark.parametrize(
    ("factory", "text"),
    [
        (
            lambda: nn.Sequential(nn.Linear(5, 3), nn.LogSoftmax(-1)),
            "is no linear layer's or convolution's own output",
        ),
        (InPlace, r"are not what 'head' gives \(off by"),
    ],
)
def test_outputs_that_no_layer_gives_take_no_temperature(factory: Factory, text: str) -> None:
    a = seeded(factory, 0)
    with pytest.raises(ModelError, match=rf"Scaling the outputs.*{text}"):
        repaired("temperature", a, a, learnt(a, a), 0.5)


def test_a_tied_head_takes_no_temperature() -> None:
    a, b = seeded(Tied, 0), seeded(Tied, 1)
    with pytest.raises(
        ModelError, match="the last layer 'head' shares its weight or bias with another layer"
    ):
        merge([a, b], repair="none+temperature", batches=[(torch.tensor([0, 1]), torch.tensor([0, 1]))])


@pytest.mark.parametrize(
    ("right", "text"), [(True, "it is right about all of them"), (False, "it is no better than chance")]
)
def test_no_temperature_is_best(right: bool, text: str) -> None:
    model = nn.Linear(3, 3).double().eval()
    model.load_state_dict({"weight": 4 * torch.eye(3).double(), "bias": torch.zeros(3).double()})
    data = [(torch.eye(3).double(), torch.arange(3) if right else torch.tensor([1, 2, 0]))]
    with pytest.raises(ModelError, match=f"No temperature is best .*{text}"):
        repaired("temperature", model, model, data, 0.5)


def test_a_temperature_needs_labels_and_cross_entropy() -> None:
    a, b = seeded(mlp, 0), seeded(mlp, 1)
    values = [(normal(8, 5), normal(8, 3))]
    with pytest.raises(DataError, match="fitted by cross-entropy of logits and labels; the loss is mse"):
        merge([a, b], repair="temperature", batches=values, loss="mse")
    ignored = [(normal(8, 5), torch.full((8,), -100))]
    with pytest.raises(DataError, match="every label of these data is one that is ignored"):
        merge([a, b], repair="temperature", batches=ignored)


# --- The choice -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["mlp", "without bias", "normed"])
@pytest.mark.parametrize("asked", ["auto", "auto+temperature"])
def test_auto_is_the_best_on_the_data_and_never_worse_than_none(case: str, asked: str) -> None:
    factory, shape = CASES[case]
    a, b, data = seeded(factory, 0), seeded(factory, 1), examples(shape)
    found = merged([a, b], repair=asked, batches=data)
    assert found.repair is not None
    losses = found.repair.losses
    assert found.repair.name == min(losses, key=losses.__getitem__)
    got = evaluate(a, data, state=found.state).loss
    assert got == pytest.approx(min(losses.values()), rel=1e-9)
    assert (
        got <= losses["none"] == pytest.approx(evaluate(a, data, state=Straight(a, b).at(0.5)).loss, rel=1e-9)
    )
    for name in set(REPAIRS) & set(losses):
        with_warnings = merge([a, b], repair=name, batches=data) if name in ("batchnorm", "repair") else None
        if with_warnings is not None:
            assert evaluate(a, data, state=with_warnings).loss == pytest.approx(losses[name], rel=1e-9)
    assert ("repair" in found.repair.refused) == (case == "without bias")
    assert "chosen by the loss on the training data: none" in found.repair.words


def test_where_no_repair_helps_none_is_chosen() -> None:
    """Opposite biases: the mix of a network with itself is best as it is, and every repair gives it back."""
    a, data = seeded(mlp, 0), examples()
    found = merged([a, a], repair="auto", batches=data)
    assert found.repair is not None
    assert found.repair.name == "none"
    assert all(torch.equal(v, found.state[k]) for k, v in state_of(a).items())


# --- Lines and merges -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["none", "batchnorm", "repair", "rescale", "data-free", "temperature"])
@pytest.mark.filterwarnings("ignore::isthmus.errors.IsthmusWarning")
def test_a_merged_network_is_the_path_at_that_place(name: str) -> None:
    a, b = seeded(normed, 0), seeded(normed, 1)
    data = learnt(a, b, (3, 4, 4))
    state = merge([a, b], [3, 1], repair=name, batches=data)
    told = line(a, b, {"train": data}, points=[0, 0.25, 1], repair=name, bootstrap=0)
    fresh = seeded(normed, 5)
    fresh.load_state_dict(state)  # an ordinary checkpoint
    assert evaluate(fresh, data).loss == pytest.approx(float(told.loss[1]), rel=1e-9)
    assert told.settings["repair"] == ("none+temperature" if name == "temperature" else name)
    ends = [evaluate(m, data).loss for m in (a, b)]
    assert list(told.curve.endpoint_losses) == pytest.approx(ends, rel=1e-9)
    assert all(state[k].dtype == v.dtype and state[k].shape == v.shape for k, v in a.state_dict().items())


def test_the_named_repairs_are_those_of_paths() -> None:
    a, b, data = seeded(normed, 0), seeded(normed, 1), examples((3, 4, 4))
    straight = Straight(a, b)
    anew = Refreshed.batchnorm(straight, a, data)
    for name, path in {
        "batchnorm": anew,
        "repair": Repaired(straight, a, data),
        "rescale": Repaired(anew, a, data, hold="deviation"),
    }.items():
        found, wanted = merge([a, b], repair=name, batches=data), path.at(0.5)
        assert all(torch.allclose(found[k], v, rtol=1e-6, atol=1e-9) for k, v in wanted.items()), name


def test_several_networks_get_the_mean_of_their_statistics() -> None:
    models, data, shares = [seeded(mlp, s) for s in range(3)], examples(), [0.5, 0.3, 0.2]
    state = merge(models, shares, repair="repair", batches=data)
    look = Repaired(Straight(models[0], models[0]), models[0], data)
    of = [look.statistics(state_of(m)) for m in models]
    found = look.statistics(state)
    for name in look.layers:
        for k in (0, 1):
            goal = sum(share * one[name][k] for share, one in zip(shares, of, strict=True))
            assert isinstance(goal, Tensor)
            close(found[name][k], goal, 2e-6 * float(goal.abs().max()) + 2e-6)


def test_one_network_is_left_as_it_is() -> None:
    a, b = seeded(mlp, 0), seeded(mlp, 1)
    found = merged([a, b], [1, 0], repair="repair", batches=examples())
    assert all(torch.equal(v, found.state[k]) for k, v in state_of(a).items())


@pytest.mark.filterwarnings("ignore::isthmus.errors.IsthmusWarning")
def test_half_precision_is_kept() -> None:
    a, b = (seeded(mlp, seed).bfloat16() for seed in (0, 1))
    data = [(x.bfloat16(), y) for x, y in examples()]
    state = merge([a, b], repair="auto+temperature", batches=data)
    assert {v.dtype for v in state.values()} == {torch.bfloat16}


def test_ten_layers_are_brought_back() -> None:
    """The paper's example of variance collapse, small: its perceptron has ten hidden layers of 512, on MNIST."""
    data = load_dataset("digits", split="train")
    settings = [TrainSettings(seed=s, epochs=8, batch_size=50, learning_rate=0.02) for s in (0, 1)]
    a, b = (train(perceptron(64, 64, 10, 10), data, s, strict=False).model for s in settings)
    batches = to_batches(data, len(data))
    b_near = isthmus.align(a, b, batches=batches, method="correlation").apply(b)
    losses = {
        name: evaluate(a, batches, state=merge([a, b_near], repair=name, batches=batches)).loss
        for name in ("none", "repair", "auto")
    }
    assert losses["repair"] < 0.85 * losses["none"]
    assert losses["auto"] <= min(losses.values())


def test_data_named_test_are_noted() -> None:
    a, b, data = seeded(mlp, 0), seeded(mlp, 1), examples()
    with pytest.warns(
        IsthmusWarning, match="repaired with 'test', data that the networks are also judged by"
    ):
        line(a, b, {"test": data}, points=3, repair="repair", bootstrap=0)
    found = line(a, b, {"test": data}, points=3, repair="repair", refresh_batches=data, bootstrap=0)
    assert not any("repaired" in note for note in found.notes)


def test_equal_networks_need_no_repair() -> None:
    a, data = seeded(mlp, 0), examples()
    found = line(a, a, {"train": data}, points=3, repair="repair", bootstrap=0)
    assert found.barrier == 0.0
    assert found.settings["repair"] == "none"


# --- Bad use ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["glue", "repair+glue", "temperature+temperature", "", 3, "+temperature"])
def test_unknown_names(name: str) -> None:
    with pytest.raises(
        DataError, match=r"Unknown repair .*: expected one of none, batchnorm, repair, rescale"
    ):
        check_repair(name)


def test_bad_use() -> None:
    a, b, data = seeded(mlp, 0), seeded(mlp, 1), examples()
    with pytest.raises(DataError, match=r"repair='auto' needs batches=\.\.\. of training data"):
        merge([a, b], repair="auto")
    with pytest.raises(
        DataError, match="repair='noise' runs the network on inputs of the right shape: pass example"
    ):
        merge([a, b], repair="noise")
    with pytest.raises(ModelError, match="repair='repair' runs the network: pass its architecture as model="):
        merge([state_of(a), state_of(b)], repair="repair", batches=data)
    with pytest.raises(DataError, match="repair and refresh are both given"):
        merge([a, b], repair="repair", refresh="batchnorm", batches=data)
    with pytest.raises(DataError, match="repair and refresh='batchnorm' are both given"):
        line(a, b, data, repair="repair", refresh="batchnorm")
    with pytest.raises(ModelError, match=r"no BatchNorm that keeps any\. Try repair='repair'"):
        merge([a, b], repair="batchnorm", batches=data)
    with pytest.raises(DataError, match="expected hold='both' or 'deviation', found 'mean'"):
        Repaired(Straight(a, b), a, data, hold="mean")
    with pytest.raises(ModelError, match="'0' has no bias, so that its mean cannot be set"):
        merge([seeded(without_bias, s) for s in (0, 1)], repair="repair", batches=data)


def test_data_free_refuses_what_it_does_not_know() -> None:
    first = lambda: nn.Sequential(nn.BatchNorm1d(5), nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3))  # noqa: E731
    a, b = seeded(first, 0), seeded(first, 1)
    with pytest.raises(ModelError, match="'0' normalises no layer's own output"):
        merge([a, b], repair="data-free", args=normal(2, 5))
    a = seeded(mlp, 0)
    opposed = {k: -v if k == "0.weight" else v for k, v in state_of(a).items()}
    with pytest.raises(ModelError, match=r"the weights of 8 of 8 units of '0' cancel"):
        merge([a, opposed], repair="data-free", args=(normal(2, 5),))
    tied = seeded(Tied, 0)
    with pytest.raises(ModelError, match=r"some inputs of this network are no floating numbers \(tokens"):
        merge([tied, seeded(Tied, 1)], repair="noise", args=torch.tensor([0, 1]))


def test_where_nothing_can_be_done_at_all_it_is_said() -> None:
    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            return torch.full_like(self.head(x), float("nan"))

    with pytest.raises(ModelError, match="No repair is possible: The loss of the model is NaN"):
        merge([seeded(Broken, 0), seeded(Broken, 1)], repair="auto", batches=examples())
