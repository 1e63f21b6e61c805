from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from isthmus.batches import Batch
from isthmus.connectivity import Line, _line, _networks, interpolate, line, loss_barrier
from isthmus.errors import CheckpointError, DataError, ModelError, ShapeError, VerificationError
from isthmus.evaluation import bind, evaluate
from isthmus.matching import align
from isthmus.moments import refresh_batchnorm
from isthmus.states import state_of


def seeded(factory, seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return factory().eval()


def mlp(activation: type[nn.Module] = nn.ReLU) -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), activation(), nn.Linear(6, 3))


def normed() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3))


def examples(count: int = 30, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 4, generator=generator), torch.randint(3, (count,), generator=generator)


def cross_entropies(outputs: Tensor, targets: Tensor) -> Tensor:
    return nn.functional.cross_entropy(outputs, targets, reduction="none")


class Relabelled:
    """An alignment of the six hidden units: a 3-cycle and one more move; ``damage`` forgets one tensor."""

    method = "by hand"
    order = torch.tensor([1, 2, 0, 4, 5, 3])

    def __init__(self, damage: str | None = None) -> None:
        self.damage = damage

    def apply(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        moved = dict(state)
        for name in ("0.weight", "0.bias", "1.weight", "1.bias", "1.running_mean", "1.running_var"):
            if name in state and name != self.damage:
                moved[name] = state[name][self.order]
        last = "2.weight" if "2.weight" in state else "3.weight"
        moved[last] = state[last][:, self.order]
        return moved


class Inverse(Relabelled):
    order = torch.tensor([2, 0, 1, 5, 3, 4])


def permuted(model: nn.Module, factory=mlp) -> nn.Module:
    other = seeded(factory, 9).to(next(model.parameters()).dtype)
    other.load_state_dict(Relabelled().apply(model.state_dict()))
    return other


def hilly(count: int = 30) -> tuple[nn.Module, nn.Module, tuple[Tensor, Tensor]]:
    """Return a network, its permuted self and data that both label rightly: a barrier lies between them."""
    model = seeded(mlp)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4)
        inputs = examples(count)[0]
        return model, permuted(model), (inputs, model(inputs).argmax(1))


def cut(data: tuple[Tensor, Tensor], *sizes: int) -> list[tuple[Tensor, Tensor]]:
    return list(zip(data[0].split(list(sizes)), data[1].split(list(sizes)), strict=True))


class Scalar(nn.Module):
    """One weight, squared: f(x) = w² x, so every number on the line is known."""

    def __init__(self, weight: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([weight], dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight.square() * x


def test_every_number_by_hand() -> None:
    # f_A = x, f_B = x (w = 1 and -1); at t the weight is 1 - 2t; loss = mean (f - 0)²
    x = torch.tensor([[1.0], [-2.0]]).double()
    found = line(Scalar(1.0), Scalar(-1.0), [(x, torch.zeros(2, 1))], points=5, loss="mse")
    curve = found.curve
    assert curve.ts.tolist() == [0.0, 0.25, 0.5, 0.75, 1.0]
    torch.testing.assert_close(curve.loss, 2.5 * (1 - 2 * curve.ts) ** 4)
    torch.testing.assert_close(curve.chord, torch.full((5,), 2.5).double())
    torch.testing.assert_close(curve.lmc_error, 1.5 * (1 - (1 - 2 * curve.ts) ** 2))
    assert (found.barrier, found.barrier_at) == (0.0, 0.0)
    assert found.lmc_error_sup == 1.5
    assert found.midpoint_loss == 0.0
    assert found.ensemble_loss == 2.5
    assert curve.endpoint_losses == (2.5, 2.5)
    assert (
        found.accuracy
        is found.midpoint_accuracy
        is found.ensemble_accuracy
        is curve.endpoint_accuracies
        is None
    )
    # against the target of the endpoints instead, the loss is (x² (w² - 1))², a true barrier
    risen = line(Scalar(1.0), Scalar(-1.0), [(x, x)], points=5, loss="mse")
    assert risen.barrier == risen.midpoint_loss == 2.5
    assert risen.barrier_at == 0.5
    assert risen.curve.spacing == 0.25


def test_t_is_the_weight_of_b() -> None:
    found = line(
        Scalar(0.0), Scalar(1.0), [(torch.ones(1, 1), torch.zeros(1, 1))], points=[0, 0.25, 1], loss="mse"
    )
    torch.testing.assert_close(found.loss, torch.tensor([0.0, 0.25**4, 1.0]).double())
    assert found.midpoint_loss == pytest.approx(0.5**4)


@pytest.mark.parametrize("loss", ["cross_entropy", "function"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_against_separate_evaluations(dtype: torch.dtype, loss: str) -> None:
    a, b, data = hilly()
    a, b = a.to(dtype), b.to(dtype)
    chosen = loss if loss == "cross_entropy" else cross_entropies
    found = line(a, b, cut(data, 20, 10), points=5, loss=chosen)
    assert found.accuracy is not None
    for k, t in enumerate(found.ts.tolist()):
        wanted = evaluate(a, [data], state=interpolate(a, b, t))
        assert float(found.loss[k]) == pytest.approx(wanted.loss, rel=1e-6)
        assert float(found.accuracy[k]) == pytest.approx(wanted.accuracy)
    with torch.no_grad():
        f_a, f_b = a(data[0].to(dtype)), b(data[0].to(dtype))
        f_t = bind(a, interpolate(a, b, 0.25))(Batch((data[0],)))
    mean = nn.functional.cross_entropy((f_a + f_b) / 2, data[1])
    assert found.ensemble_loss == pytest.approx(float(mean), rel=1e-6)
    right = (f_a + f_b).argmax(1) == data[1]
    assert found.ensemble_accuracy == pytest.approx(float(right.double().mean()))
    wanted_error = (f_t - (0.75 * f_a + 0.25 * f_b)).norm(dim=1).mean()
    assert float(found.lmc_error[1]) == pytest.approx(float(wanted_error), rel=1e-5)
    again = loss_barrier(found.loss, found.ts)
    assert (found.barrier, found.barrier_at) == (again.height, again.at)
    assert found.barrier > 0.1
    assert found.lmc_error[0] == found.lmc_error[-1] == 0.0


@pytest.mark.filterwarnings("ignore:Running statistics inside the line")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("factory", [mlp, normed])
def test_no_barrier_between_a_network_and_itself(dtype: torch.dtype, factory) -> None:
    model = seeded(factory).to(dtype)
    found = line(model, model, [examples()], points=4, refresh=None)
    assert found.barrier == 0.0
    assert found.lmc_error_sup == 0.0
    assert found.endpoint_error == 0.0
    assert found.midpoint_loss == found.ensemble_loss == float(found.loss[0])


@pytest.mark.filterwarnings("ignore:Running statistics inside the line")
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-14), (torch.float32, 1e-6), (torch.bfloat16, 0.02)], ids=str
)
@pytest.mark.parametrize("factory", [mlp, normed])
def test_no_barrier_to_the_permuted_self_once_aligned(dtype: torch.dtype, tolerance: float, factory) -> None:
    model = seeded(factory).to(dtype)
    other = permuted(model, factory)
    plain = line(model, other, [examples()], points=5, refresh=None)
    aligned = line(model, other, [examples()], points=5, alignment=Inverse(), refresh=None)
    assert plain.lmc_error_sup > 0.05
    assert aligned.barrier <= tolerance
    assert aligned.lmc_error_sup <= tolerance
    assert aligned.endpoint_error <= tolerance
    assert aligned.settings["alignment"] == "by hand"


@pytest.mark.parametrize("damage", ["0.weight", "0.bias"])
def test_a_damaged_alignment_is_caught(damage: str) -> None:
    a, b = seeded(mlp, 0), seeded(mlp, 1)
    with pytest.raises(
        VerificationError, match=r"The alignment changes the function of B: outputs differ by \d"
    ):
        line(a, b, [examples()], alignment=Relabelled(damage))


def test_batch_norm_statistics_left_behind_are_caught() -> None:
    a, b = seeded(normed, 0), seeded(normed, 1)
    b[1].running_mean.copy_(torch.linspace(-1, 1, 6))  # type: ignore[index,union-attr,operator]
    with pytest.raises(VerificationError, match="The alignment changes the function of B"):
        line(a, state_of(b), [examples()], alignment=Relabelled("1.running_mean"))


def test_endpoint_losses_are_those_of_the_original_network(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = seeded(mlp, 0), seeded(mlp, 1)
    monkeypatch.setattr(_line, "ENDPOINT_TOLERANCE", math.inf)
    found = line(a, b, [examples()], points=3, alignment=Relabelled("0.weight"))
    assert float(found.loss[-1]) == pytest.approx(evaluate(b, [examples()]).loss, rel=1e-12)
    assert found.endpoint_error > 0.1


def test_networks_of_other_code_are_caught() -> None:
    a, b = seeded(mlp, 0), seeded(lambda: mlp(nn.Tanh), 1)
    with pytest.raises(
        ModelError, match="Model B computes something else than its tensors do in model A's code"
    ):
        line(a, b, [examples()])


@pytest.mark.parametrize("aligned", [False, True])
def test_a_state_stands_for_b(aligned: bool) -> None:
    a, b = seeded(normed, 0), seeded(normed, 1)
    alignment = Relabelled() if aligned else None
    whole = line(a, b, [examples()], alignment=alignment)
    from_state = line(a, b.state_dict(), [examples()], alignment=alignment)
    assert torch.equal(whole.loss, from_state.loss)
    assert from_state.barrier_error == whole.barrier_error


@pytest.mark.filterwarnings("ignore:Running statistics inside the line")
@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize("refresh", [None, "batchnorm"])
def test_nothing_is_changed(aligned: bool, refresh: str | None) -> None:
    a, b = seeded(normed, 0), seeded(normed, 1)
    data = examples()
    tensors = [*a.state_dict().values(), *b.state_dict().values(), *data]
    before = [t.clone() for t in tensors]
    random_state = torch.random.get_rng_state()
    line(a, b, [data], points=3, alignment=Relabelled() if aligned else None, refresh=refresh)
    assert all(torch.equal(x, y) for x, y in zip(tensors, before, strict=True))
    assert not any(m.training for m in (*a.modules(), *b.modules()))
    assert torch.equal(random_state, torch.random.get_rng_state())


def test_the_order_of_data_and_generators() -> None:
    a, b, data = seeded(mlp, 0).double(), seeded(mlp, 1).double(), examples()
    listed = line(a, b, cut(data, 7, 13, 10))
    turned = line(a, b, cut(data, 7, 13, 10)[::-1])
    generated = line(a, b, (pair for pair in cut(data, 7, 13, 10)))
    torch.testing.assert_close(turned.loss, listed.loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(turned.lmc_error, listed.lmc_error, rtol=1e-12, atol=0)
    assert turned.barrier == pytest.approx(listed.barrier, rel=1e-10)
    assert json.dumps(generated.to_dict()) == json.dumps(listed.to_dict())


def test_states_made_anew_give_the_same_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b, data = seeded(mlp, 0), seeded(mlp, 1), cut(examples(), 20, 10)
    kept = line(a, b, data)
    monkeypatch.setattr(_networks, "KEPT_BYTES", 0)
    anew = line(a, b, data)
    for name in ("loss", "lmc_error", "accuracy"):
        torch.testing.assert_close(getattr(anew, name), getattr(kept, name), rtol=1e-6, atol=1e-7)


def test_several_data_sets() -> None:
    a, b = seeded(mlp, 0), seeded(mlp, 1)
    found = line(a, b, {"train": [examples(30, 0)], "test": [examples(12, 1)]}, points=3)
    assert list(found.curves) == ["train", "test"]
    assert found.curves["test"].examples == 12
    assert torch.equal(found.curves["test"].loss, line(a, b, [examples(12, 1)], points=3).loss)
    train = found.curves["train"]
    for name in (
        "ts",
        "loss",
        "accuracy",
        "chord",
        "barrier",
        "barrier_at",
        "barrier_error",
        "midpoint_loss",
    ):
        assert getattr(found, name) is getattr(train, name)
    for name in ("midpoint_accuracy", "lmc_error", "lmc_error_sup", "ensemble_loss", "ensemble_accuracy"):
        assert torch.equal(torch.as_tensor(getattr(found, name)), torch.as_tensor(getattr(train, name)))


@pytest.mark.parametrize("points", [2, 3, 4, [0.0, 0.9, 1.0]])
def test_the_midpoint_is_measured_on_every_grid(points: Any) -> None:
    a, b, data = seeded(mlp, 0), seeded(mlp, 1), examples()
    found = line(a, b, [data], points=points)
    middle = evaluate(a, [data], state=interpolate(a, b, 0.5))
    assert found.midpoint_loss == pytest.approx(middle.loss, rel=1e-6)
    assert found.midpoint_accuracy == middle.accuracy
    assert len(found.loss) == len(found.ts) == (points if isinstance(points, int) else 3)
    if points == 2:
        assert found.barrier == 0.0
        assert found.curve.spacing == 1.0


def test_sequences_average_positions() -> None:
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(7, 4), nn.Linear(4, 7)

        def forward(self, tokens: Tensor) -> dict[str, Tensor]:
            return {"logits": self.head(self.embed(tokens))}

    a, b = seeded(Tokens, 0), seeded(Tokens, 1)
    tokens = torch.randint(7, (5, 6), generator=torch.Generator().manual_seed(0))
    found = line(a, b, [{"tokens": tokens, "labels": tokens.roll(-1, 1)}], points=3)
    assert found.curve.examples == 5
    with torch.no_grad():
        f_a, f_b = a(tokens)["logits"], b(tokens)["logits"]
        f_t = bind(a, interpolate(a, b, 0.5))(Batch((tokens,)))
    loss = nn.functional.cross_entropy(f_t.movedim(-1, 1), tokens.roll(-1, 1))
    assert found.midpoint_loss == pytest.approx(float(loss), rel=1e-5)
    error = (f_t - (f_a + f_b) / 2).norm(dim=-1).mean()
    assert float(found.lmc_error[1]) == pytest.approx(float(error), rel=1e-5)


@pytest.mark.filterwarnings("ignore:Running statistics inside the line")
def test_refresh_batchnorm_treats_interior_points_only() -> None:
    a, b, data = seeded(normed, 0), seeded(normed, 1), examples(60)
    for model in (a, b):  # statistics the data do not have
        model[1].running_var.fill_(5.0)  # type: ignore[index,union-attr,operator]
    plain = line(a, b, [data], points=3, refresh=None)
    found = line(a, b, [data], points=3, refresh="batchnorm")
    assert float(found.loss[0]) == pytest.approx(float(plain.loss[0]), rel=1e-9)
    assert float(found.loss[-1]) == pytest.approx(float(plain.loss[-1]), rel=1e-9)
    middle = refresh_batchnorm(a, interpolate(a, b, 0.5), [data])
    assert found.midpoint_loss == pytest.approx(evaluate(a, [data], state=middle).loss, rel=1e-6)
    assert abs(found.midpoint_loss - plain.midpoint_loss) > 1e-3
    assert found.settings["refresh"] == "batchnorm"


def test_refresh_uses_the_training_data_unless_told() -> None:
    a, b = seeded(normed, 0), seeded(normed, 1)
    train, test = examples(40, 0), examples(20, 1)
    both = {"test": iter([test]), "train": iter([train])}
    default = line(a, b, both, points=3, refresh="batchnorm")
    named = line(a, b, [test], points=3, refresh="batchnorm", refresh_batches=iter([train[0]]))
    own = line(a, b, iter([test]), points=3, refresh="batchnorm")
    assert torch.equal(default.loss, named.loss)
    assert not torch.equal(own.loss, named.loss)


def test_refresh_by_a_function() -> None:
    a, b, data = seeded(mlp, 0), seeded(mlp, 1), examples()

    def silent(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {k: torch.zeros_like(v) for k, v in state.items()}

    found = line(a, b, [data], points=4, refresh=silent)
    assert found.loss[1:3].tolist() == pytest.approx([math.log(3)] * 2)
    assert float(found.loss[0]) == pytest.approx(evaluate(a, [data]).loss)
    assert found.settings["refresh"] == "silent"


def test_standard_errors_are_sane() -> None:
    a, b, data = hilly(400)
    data[1][:12] = 0  # some wrong labels, so that the endpoints err too
    found = line(a, b, [data], points=3, bootstrap=2000)
    curve = found.curve
    assert curve.loss_error is not None
    assert curve.accuracy is not None
    assert curve.accuracy_error is not None
    with torch.no_grad():
        losses = cross_entropies(a(data[0]), data[1]).double()
    assert float(curve.loss_error[0]) == pytest.approx(float(losses.std() / 20), rel=0.1)
    share = curve.accuracy[0]
    assert float(curve.accuracy_error[0]) == pytest.approx(float((share * (1 - share) / 400).sqrt()), rel=0.1)
    assert curve.midpoint_loss_error == float(curve.loss_error[1])
    # with one interior point the barrier is a mean over examples, so its error has a formula too
    middle = bind(a, interpolate(a, b, 0.5))(Batch((data[0],)))
    with torch.no_grad():
        ends = [cross_entropies(m(data[0]), data[1]) for m in (a, b)]
    gap = cross_entropies(middle, data[1]) - (ends[0] + ends[1]) / 2
    assert found.barrier == pytest.approx(float(gap.mean()), rel=1e-5)
    assert found.barrier > 4 * float(gap.std() / 20)  # else the maximum with zero would cut the spread
    assert found.barrier_error == pytest.approx(float(gap.std() / 20), rel=0.1)


def test_resampling_is_seeded() -> None:
    a, b, data = seeded(mlp, 0), seeded(mlp, 1), [examples()]
    default, again = line(a, b, data), line(a, b, data)
    other = line(a, b, data, generator=torch.Generator().manual_seed(5))
    assert default.barrier_error == again.barrier_error != other.barrier_error
    assert (default.settings["seed"], other.settings["seed"]) == (0, 5)


@pytest.mark.parametrize(("count", "bootstrap"), [(1, 200), (30, 0)])
def test_no_standard_errors_without_resamples(count: int, bootstrap: int) -> None:
    found = line(seeded(mlp, 0), seeded(mlp, 1), [examples(count)], points=3, bootstrap=bootstrap)
    curve = found.curve
    assert (
        curve.loss_error is curve.accuracy_error is curve.barrier_error is curve.midpoint_loss_error is None
    )
    assert "±" not in str(found)


def test_results_are_plain_and_readable() -> None:
    a, b = seeded(mlp, 0), seeded(mlp, 1)
    found = line(a, b, {"train": [examples()], "test": [examples(5, 1)]}, points=3)
    plain = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert plain["curves"]["test"]["loss"] == found.curves["test"].loss.tolist()
    assert plain["curves"]["train"]["endpoint_losses"] == list(found.curve.endpoint_losses)
    assert plain["curves"]["train"]["endpoint_accuracies"] == list(found.curve.endpoint_accuracies or ())
    assert plain["curves"]["train"]["lmc_error_sup"] == found.lmc_error_sup
    assert plain["settings"]["points"] == 3
    text = str(found)
    for part in (
        "midpoint",
        "barrier",
        "LMC error",
        "train",
        "test",
        "±",
        f"{found.midpoint_loss:.4g}",
        "accuracy",
    ):
        assert part in text
    regression = line(Scalar(1.0), Scalar(2.0), [(torch.ones(2, 1), torch.ones(2, 1))], loss="mse")
    json.dumps(regression.to_dict(), allow_nan=False)
    assert "accuracy" not in str(regression)


def small_line(**changes: Any) -> Line:
    settings: dict[str, Any] = {"model_a": seeded(mlp, 0), "model_b": seeded(mlp, 1), "batches": [examples()]}
    return line(**{**settings, **changes})


def broken(value: float) -> nn.Module:
    model = seeded(mlp, 2)
    with torch.no_grad():
        model[0].weight[0, 1] = value  # type: ignore[index,union-attr]
    return model


def training() -> nn.Module:
    return nn.Sequential(*seeded(mlp, 0), nn.Dropout(0.5)).train()


class RandomInEvaluation(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(super().forward(x), training=True)


def of_labels(*labels: int) -> list[tuple[Tensor, Tensor]]:
    return [(examples(len(labels))[0], torch.tensor(labels))]


X, Y = examples()
NAN_INPUT = [(torch.full((2, 4), math.nan), torch.tensor([0, 1]))]


@pytest.mark.parametrize(
    ("changes", "error", "text"),
    [
        ({"batches": []}, DataError, "data: expected at least one batch, found none"),
        ({"batches": {}}, DataError, "at least one data set, found an empty mapping"),
        ({"batches": {"test": iter([])}}, DataError, "test: expected at least one batch"),
        ({"batches": (X, Y)}, DataError, "has no targets"),
        ({"batches": X}, DataError, r"on 'data': expected an iterable of batches, found a Tensor"),
        ({"batches": {"x": X, "labels": Y}}, DataError, r"on 'x': expected an iterable of batches"),
        ({"batches": Batch((X,), {}, Y)}, DataError, r"Put a single batch in a list"),
        ({"batches": [(X[:0], Y[:0])]}, DataError, "batch 0 holds no examples"),
        ({"batches": of_labels(0, 3)}, DataError, r"Labels run from 0 to 3, .* expected 0\.\.2"),
        ({"batches": of_labels(-1, 1)}, DataError, "Labels run from -1 to 1"),
        ({"batches": NAN_INPUT}, ModelError, "The loss on 'data' at t = 0 is NaN or infinite on 2 of 2"),
        ({"model_a": broken(math.nan)}, CheckpointError, r"A: '0\.weight' has 1 NaN"),
        ({"model_b": broken(math.inf)}, CheckpointError, r"B: '0\.weight' has 1 NaN"),
        ({"model_b": seeded(normed)}, CheckpointError, "different architectures"),
        ({"model_b": seeded(lambda: nn.Sequential(nn.Linear(4, 5)))}, CheckpointError, "B lacks"),
        ({"model_a": training()}, ModelError, r"Model A is in training mode: 3 \(Dropout\)"),
        ({"model_b": training()}, ModelError, r"Model B is in training mode: 3 \(Dropout\)"),
        ({"model_a": RandomInEvaluation(*mlp())}, ModelError, "Model A is random in evaluation"),
        ({"model_b": RandomInEvaluation(*mlp())}, ModelError, "Model B is random in evaluation"),
        (
            {"model_a": state_of(seeded(mlp))},
            ModelError,
            r"expected model_a to be a torch\.nn\.Module, found OrderedDict",
        ),
        ({"points": 1}, ShapeError, "points of 2 or more"),
        ({"points": [0.0, 0.5]}, ShapeError, "rise strictly from 0 to 1"),
        ({"bootstrap": 1}, DataError, "0 or at least 2 bootstrap resamples, found 1"),
        ({"bootstrap": -5}, DataError, "found -5"),
        ({"loss": "hinge"}, DataError, "Unknown loss 'hinge'"),
        ({"refresh": "repair"}, DataError, "Unknown refresh 'repair'"),
        ({"refresh": None, "refresh_batches": [X]}, DataError, 'only refresh="batchnorm" uses it'),
        ({"refresh": lambda state: {}}, CheckpointError, "the refreshed state lacks"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_bad_input(changes: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        small_line(**changes)


def test_a_narrower_b_and_a_bad_alignment() -> None:
    narrow = seeded(lambda: nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)))
    with pytest.raises(ShapeError, match=r"'0\.weight': A has shape \(6, 4\), B has \(5, 4\)"):
        small_line(model_b=narrow)

    class Cutting:
        def apply(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
            return {k: v[:2] for k, v in state.items()}

    with pytest.raises(ShapeError, match="aligned B"):
        small_line(alignment=Cutting())


def test_overflow_on_the_way_is_named() -> None:
    a, b = seeded(mlp, 0), seeded(mlp, 1)

    def exploding(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {k: v * 1e30 for k, v in state.items()}

    with pytest.raises(ModelError, match=r"The loss on 'data' at t = 0\.5 is NaN or infinite on \d+ of 30"):
        line(a, b, [examples()], points=3, refresh=exploding)


def test_data_are_loaded_once() -> None:
    loads = 0

    def loader() -> Iterator[tuple[Tensor, Tensor]]:
        nonlocal loads
        for pair in cut(examples(), 10, 10, 10):
            loads += 1
            yield pair

    line(seeded(mlp, 0), seeded(mlp, 1), loader(), points=11)
    assert loads == 3


def test_a_matched_network_meets_its_permuted_self() -> None:
    a, b, data = hilly()
    a, b = a.double(), b.double()
    found = line(a, b, [data], alignment=align(a, b, method="weights", args=(data[0].double(),)))
    assert found.barrier <= 1e-12
    assert found.endpoint_error <= 1e-12
    assert found.settings["alignment"] == "weights"
    assert line(a, b, [data]).barrier > 0.1
