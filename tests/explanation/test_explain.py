"""What a barrier consists of: the split is exact, and so are the layers' statistics and the sum of the stages."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import isthmus
from isthmus import Straight, explain, line
from isthmus.errors import DataError, ModelError, VerificationError
from isthmus.evaluation import evaluate
from isthmus.explanation import Explanation
from isthmus.states import State, state_of
from isthmus.testing import randomise_state

Factory = Callable[[], nn.Module]
Data = list[tuple[Tensor, Tensor]]


def seeded(factory: Factory, seed: int) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = factory()
    return randomise_state(model, torch.Generator().manual_seed(seed)).eval().double()


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double() + 0.3


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 7), nn.Tanh(), nn.Linear(7, 3))


def normed() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 6, 2, bias=False), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 5, 2), nn.ReLU(),
        nn.Flatten(), nn.Linear(20, 3),
    )  # fmt: skip


def cut(inputs: Tensor, labels: Tensor) -> Data:
    return [(inputs[:23], labels[:23]), (inputs[23:], labels[23:])]


def outputs(model: nn.Module, state: State, inputs: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.func.functional_call(model, state, (inputs,))


@pytest.mark.parametrize("t", [0.2, 0.5])
def test_the_split_is_exact_example_by_example(t: float) -> None:
    a, b, inputs, labels = seeded(mlp, 0), seeded(mlp, 1), normal(60, 5), torch.arange(60) % 3
    found = explain(a, b, cut(inputs, labels), t=t)
    split = found.split
    assert split is not None
    f_a, f_b, f_t = (outputs(a, s, inputs) for s in (state_of(a), state_of(b), Straight(a, b).at(t)))
    losses = [F.cross_entropy(f, labels, reduction="none") for f in (f_a, f_b, f_t)]
    rises = losses[2] - torch.lerp(losses[0], losses[1], t)
    middle = torch.lerp(f_a, f_b, t)
    error = f_t - middle
    terms = {
        "spread": f_t.logsumexp(-1) - middle.logsumexp(-1),
        "ensemble_gain": torch.lerp(f_a.logsumexp(-1), f_b.logsumexp(-1), t) - middle.logsumexp(-1),
        "own": error[torch.arange(60), labels],
    }
    assert bool((terms["ensemble_gain"] >= 0).all())
    for name, values in terms.items():
        assert getattr(split, name) == pytest.approx(float(values.mean()), abs=1e-12)
    assert split.rise == pytest.approx(split.spread - split.ensemble_gain - split.own, abs=1e-12)
    assert split.rise == pytest.approx(float(rises.mean()), abs=1e-12)
    assert found.rise == pytest.approx(split.rise, abs=1e-12)
    assert split.error == pytest.approx(float(rises.std()) / 60**0.5, rel=1e-12)
    assert split.spread <= float(error.max(1).values.mean()) + 1e-12


def test_who_carries_it() -> None:
    a, b, inputs = seeded(mlp, 0), seeded(mlp, 1), normal(60, 5)
    labels = outputs(a, state_of(a), inputs).argmax(1)
    found = explain(a, b, cut(inputs, labels))
    assert found.split is not None
    losses = [
        F.cross_entropy(outputs(a, s, inputs), labels, reduction="none")
        for s in (state_of(a), state_of(b), Straight(a, b).at(0.5))
    ]
    rises = losses[2] - (losses[0] + losses[1]) / 2
    if float(rises.sum()) <= 0:
        pytest.fail("the example must have a rise")
    ordered, count = rises.sort(descending=True).values, 1
    while float(ordered[:count].sum()) < float(rises.sum()) / 2:
        count += 1
    assert found.split.half == pytest.approx(count / 60)
    assert sum(kind.share for kind in found.split.classes) == pytest.approx(1)
    assert sum(kind.rows for kind in found.split.classes) == 60
    for kind in found.split.classes:
        of = rises[labels == kind.label]
        assert kind.rise == pytest.approx(float(of.mean()))
        assert kind.share == pytest.approx(float(of.sum() / rises.sum()))
    shares = [kind.share for kind in found.split.classes]
    assert shares == sorted(shares, reverse=True)


def test_a_factor_on_the_logits_is_told() -> None:
    """The point is the ends with a third of their logits: all of the rise is one of scale."""
    a, inputs = seeded(mlp, 0), normal(60, 5)
    logits = outputs(a, state_of(a), inputs)
    noise = torch.randn(60, 3, generator=torch.Generator().manual_seed(3)).double()
    labels = (logits + 0.2 * logits.std() * noise).argmax(1)

    class Bent(nn.Module):
        """Weights w and 1 - w give the same logits, their middle a third of them."""

        def __init__(self) -> None:
            super().__init__()
            self.bend = nn.Parameter(torch.zeros(1).double())

        def forward(self, x: Tensor) -> Tensor:
            return x * (1 - 8 / 3 * self.bend * (1 - self.bend))

    bent = Bent().eval()
    found = explain(bent, {"bend": torch.ones(1).double()}, cut(4 * logits / logits.std(), labels))
    assert found.split is not None
    assert found.split.scale is not None
    assert found.split.scale > 0.8
    assert any("One factor on the logits takes away" in text for text in found.findings)
    assert found.layers == ()


@pytest.mark.parametrize("factory", [mlp, normed])
def test_layers_have_the_correlation_and_variance_of_their_outputs(factory: Factory) -> None:
    shape = (5,) if factory is mlp else (3, 4, 4)
    a, b, inputs = seeded(factory, 0), seeded(factory, 1), normal(60, *shape)
    data, t = cut(inputs, torch.arange(60) % 3), 0.3
    found = explain(a, b, data, t=t, repair="none")
    names = [layer.name for layer in found.layers]
    assert names == (["0", "2", "4"] if factory is mlp else ["1", "3", "6"])
    for layer in found.layers:
        seen = []
        for state in (state_of(a), state_of(b), Straight(a, b).at(t)):
            model = seeded(factory, 0)
            model.load_state_dict(state)
            with torch.no_grad():
                rows = model[: int(layer.name) + 1](inputs).movedim(1, 0).flatten(1)  # type: ignore[index]
            seen.append(rows - rows.mean(1, keepdim=True))
        deviations = [rows.square().mean(1).sqrt() for rows in seen]
        correlations = (seen[0] * seen[1]).mean(1) / (deviations[0] * deviations[1])
        assert layer.correlation == pytest.approx(float(correlations.mean()), abs=1e-9)
        goal = torch.lerp(deviations[0], deviations[1], t).square().sum()
        assert layer.variance == pytest.approx(float(deviations[2].square().sum() / goal), rel=1e-9)
        assert layer.units == len(correlations)


@pytest.mark.parametrize("factory", [mlp, normed])
def test_stages_add_up_to_the_rise(factory: Factory) -> None:
    shape = (5,) if factory is mlp else (3, 4, 4)
    a, b, inputs = seeded(factory, 0), seeded(factory, 1), normal(60, *shape)
    data, t = cut(inputs, torch.arange(60) % 3), 0.3
    found = explain(a, b, data, t=t)
    assert [s.layers for s in found.stages] == [(n,) for n in ("024" if factory is mlp else "036")]
    assert sum(stage.added for stage in found.stages) == pytest.approx(found.rise, abs=1e-9)
    assert found.stages[-1].rise == pytest.approx(found.rise, abs=1e-9)
    if factory is mlp:
        point = Straight(a, b).at(t)
        mixed = {"0.weight", "0.bias"}
        rises = []
        for end in (a, b):
            state = {k: point[k] if k in mixed else v for k, v in state_of(end).items()}
            rises.append(evaluate(a, data, state=state).loss - evaluate(a, data, state=state_of(end)).loss)
        assert found.stages[0].rise == pytest.approx(0.7 * rises[0] + 0.3 * rises[1], abs=1e-9)
    few = explain(a, b, data, t=t, stages=2)
    assert [stage.layers for stage in few.stages] in ([("0",), ("2", "4")], [("0", "2"), ("4",)],
                                                      [("0",), ("3", "6")], [("0", "3"), ("6",)])  # fmt: skip
    assert few.stages[-1].rise == pytest.approx(found.rise, abs=1e-9)
    assert explain(a, b, data, t=t, stages=0).stages == ()


class Tied(nn.Module):
    """A table that is read at both ends, and a parameter of the network itself."""

    def __init__(self) -> None:
        super().__init__()
        self.start = nn.Parameter(torch.randn(4))
        self.table, self.inner, self.norm = nn.Embedding(5, 4), nn.Linear(4, 4), nn.LayerNorm(4)
        self.head = nn.Linear(4, 5, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.norm(torch.tanh(self.inner(self.table(ids) + self.start))))


def test_tied_tensors_move_together() -> None:
    a, b = seeded(Tied, 0), seeded(Tied, 1)
    ids = torch.arange(40) % 5
    found = explain(a, b, [(ids, (ids + 1) % 5)])
    assert [stage.layers for stage in found.stages] == [("table", "head"), ("inner",)]
    assert sum(stage.added for stage in found.stages) == pytest.approx(found.rise, abs=1e-9)


def test_the_rise_is_that_of_the_line_and_the_ends_are_the_original() -> None:
    a, b, inputs = seeded(normed, 0), seeded(normed, 1), normal(60, 3, 4, 4)
    guesses = outputs(a, Straight(a, b).at(0.5), inputs)
    guesses += guesses.std() * torch.randn(60, 3, generator=torch.Generator().manual_seed(1)).double()
    data = cut(inputs, guesses.argmax(1))
    alignment = isthmus.align(a, b, batches=data, method="correlation")
    for repair in (None, "repair", "rescale+temperature"):
        found = explain(a, b, data, alignment=alignment, repair=repair)
        told = line(a, b, {"train": data}, points=3, alignment=alignment, repair=repair, bootstrap=0)
        assert found.losses[2] == pytest.approx(told.midpoint_loss, rel=1e-9)
        assert list(found.losses[:2]) == pytest.approx(list(told.curve.endpoint_losses), rel=1e-9)
        assert found.settings["repair"] == (repair or "batchnorm")
        assert found.settings["alignment"] == "correlation"


def test_other_losses_have_no_split_and_all_else() -> None:
    a, b, inputs = seeded(mlp, 0), seeded(mlp, 1), normal(60, 5)
    data = [(inputs, normal(60, 3, seed=1))]
    found = explain(a, b, data, loss="mse")
    assert found.split is None
    assert "The exact split is one of the cross-entropy of logits and labels; the loss here is mse" in str(
        found
    )
    assert len(found.layers) == 3
    assert sum(stage.added for stage in found.stages) == pytest.approx(found.rise, abs=1e-9)
    smooth = explain(
        a, b, cut(inputs, torch.arange(60) % 3), loss="cross_entropy(label_smoothing=0.1)", stages=0
    )
    assert smooth.split is None
    likely = explain(a, b, cut(inputs, torch.arange(60) % 3), loss=nn.NLLLoss(), stages=0)
    assert likely.split is None


def test_positions_and_labels_that_do_not_count() -> None:
    """A network that returns (n, classes, positions), with some labels ignored."""
    a, b = (
        seeded(lambda: nn.Sequential(nn.Conv1d(2, 6, 1), nn.ReLU(), nn.Conv1d(6, 4, 1)), s) for s in (0, 1)
    )
    inputs, labels = normal(20, 2, 5), torch.arange(100).reshape(20, 5) % 4
    labels[3:7, 2] = -100
    found = explain(a, b, [(inputs, labels)])
    assert found.split is not None
    assert found.split.rows == 96
    assert found.rise == pytest.approx(found.split.rise, abs=1e-12)


# --- Words ------------------------------------------------------------------------------------------------------


def test_a_network_and_itself_have_nothing_to_explain() -> None:
    a, inputs = seeded(mlp, 0), normal(60, 5)
    found = explain(a, a, cut(inputs, torch.arange(60) % 3))
    assert found.rise == 0
    assert found.findings == (
        "The loss at t = 0.5 does not rise above the chord by more than 2 standard errors: there is no barrier to "
        "explain here.",
    )
    assert all(layer.correlation == pytest.approx(1) for layer in found.layers)
    assert all(layer.variance == pytest.approx(1) for layer in found.layers)


def test_units_in_another_order_are_said_to_be_unmatched_until_they_are_aligned() -> None:
    def wide() -> nn.Module:
        return nn.Sequential(nn.Linear(5, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 3))

    a, inputs = seeded(wide, 0), normal(200, 5)
    labels = outputs(a, state_of(a), inputs).argmax(1)
    ring = torch.arange(40).roll(1)
    state = state_of(a)
    moved = {
        "0.weight": state["0.weight"][ring], "0.bias": state["0.bias"][ring],
        "2.weight": state["2.weight"][ring][:, ring], "2.bias": state["2.bias"][ring],
        "4.weight": state["4.weight"][:, ring], "4.bias": state["4.bias"],
    }  # fmt: skip
    data = [(inputs, labels)]
    found = explain(a, moved, data)
    assert any(
        text.startswith("Units are hardly matched in 0 (") and "were not relabelled: align them first" in text
        for text in found.findings
    )
    assert any(text.startswith("Variance collapses") and "--repair repair" in text for text in found.findings)
    alignment = isthmus.align(a, moved, batches=data, method="correlation")
    near = explain(a, moved, data, alignment=alignment)
    assert abs(near.rise) < 1e-9
    assert near.findings[0].startswith("The loss at t = 0.5 does not rise")
    b = seeded(wide, 1)
    wrong = explain(a, b, data, alignment=isthmus.align(a, b, batches=data, method="weights"))
    assert any("compares activations (activations, correlation)" in text for text in wrong.findings)


def test_values_are_plain() -> None:
    a, b, inputs = seeded(mlp, 0), seeded(mlp, 1), normal(60, 5)
    found = explain(a, b, cut(inputs, torch.arange(60) % 3))
    assert isinstance(found, Explanation)

    def plain(value: Any) -> bool:
        if isinstance(value, dict):
            return all(isinstance(k, str) and plain(v) for k, v in value.items())
        if isinstance(value, (list, tuple)):
            return all(map(plain, value))
        return value is None or isinstance(value, (str, int, float))

    assert plain(found.to_dict())
    told: list[str] = []
    explain(a, b, cut(inputs, torch.arange(60) % 3), on_stage=lambda stage, done, total: told.append(stage))
    assert told == ["repairing", "running the networks", *["moving layers"] * 3]


def test_a_single_label_has_no_standard_error() -> None:
    a, b = seeded(mlp, 0), seeded(mlp, 1)
    found = explain(a, b, [(normal(1, 5), torch.tensor([0]))])
    assert found.split is not None
    assert found.split.error is None
    assert str(found).splitlines()[1].startswith(f"Rise {found.rise:.4g} = ")
    unlabelled = explain(a, b, [(normal(3, 5), torch.tensor([0, -100, -100]))])
    assert unlabelled.split is not None
    assert unlabelled.split.rows == 1


def test_bad_use() -> None:
    a, b, inputs = seeded(mlp, 0), seeded(mlp, 1), normal(60, 5)
    data = cut(inputs, torch.arange(60) % 3)
    for t in (0.0, 1.0, 2.0, float("nan")):
        with pytest.raises(DataError, match="Explaining a barrier: expected t between 0 and 1, found"):
            explain(a, b, data, t=t)
    with pytest.raises(DataError, match="expected stages of 0 or more, found -1"):
        explain(a, b, data, stages=-1)
    with pytest.raises(ModelError, match=r"expected model_a to be a torch\.nn\.Module, found OrderedDict"):
        explain(state_of(a), b, data)  # type: ignore[arg-type]

    class Wrong:
        def apply(self, state: State) -> State:
            return {k: -v if k == "0.weight" else v for k, v in state.items()}

    with pytest.raises(VerificationError, match="The alignment changes the function of B: its loss is"):
        explain(a, b, data, alignment=Wrong())
