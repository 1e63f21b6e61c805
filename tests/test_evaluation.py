from __future__ import annotations

import math
from collections.abc import Mapping

import pytest
import torch
from torch import Tensor, nn

from isthmus.batches import Batch, as_batch
from isthmus.errors import CheckpointError, DataError, ModelError, ShapeError
from isthmus.evaluation import (
    bind,
    combine_states,
    evaluate,
    relative_difference,
    require_deterministic,
    require_evaluation,
    require_finite,
)
from isthmus.losses import class_axis_last, score
from isthmus.states import check_finite, state_of


def seeded(factory, seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return factory().eval()


def snapshot(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in state.items()}


def unchanged(state: Mapping[str, Tensor], before: Mapping[str, Tensor]) -> bool:
    return list(state) == list(before) and all(torch.equal(state[k], before[k]) for k in before)


def convnet() -> nn.Module:
    return nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 4))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 3)
        self.head = nn.Linear(3, 5, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.embed(tokens))


def shared() -> nn.Module:
    inner = nn.Linear(3, 3)
    return nn.Sequential(inner, nn.ReLU(), inner)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(3, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.lstm(x)[0]


class WithConstant(nn.Module):
    """A buffer that is not part of the state dict."""

    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)
        self.register_buffer("scale", torch.tensor(2.0), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * self.scale


IMAGES = torch.randn(6, 2, 4, 4, generator=torch.Generator().manual_seed(1))
CASES = {
    "convolutions and batch norm": (convnet, IMAGES),
    "tied tensors": (Tied, torch.tensor([[0, 1, 4], [2, 2, 3]])),
    "module used twice": (shared, torch.ones(2, 3)),
    "recurrent": (Recurrent, torch.ones(2, 5, 3)),
    "non-persistent buffer": (WithConstant, torch.ones(2, 3)),
    "state in lower precision": (lambda: nn.Linear(3, 2).bfloat16(), torch.ones(2, 3)),
    "state in higher precision": (lambda: nn.Linear(3, 2).double(), torch.ones(2, 3)),
}


@pytest.mark.parametrize("case", CASES)
def test_bind_runs_the_state_and_changes_nothing(case: str) -> None:
    factory, inputs = CASES[case]
    model, other = seeded(factory, 0), seeded(factory, 1)
    state = state_of(other)
    before, own = snapshot(state), snapshot(model.state_dict())
    parameters = list(model.parameters())
    batch = Batch((inputs,))
    found = bind(model, state)(batch)
    assert not found.requires_grad
    torch.testing.assert_close(found, bind(other)(batch), rtol=0, atol=0)
    assert not torch.equal(found, bind(model)(batch))
    assert unchanged(state, before)
    assert unchanged(model.state_dict(), own)
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))


def test_bind_refuses_states_that_do_not_fit() -> None:
    model = seeded(lambda: nn.Linear(2, 3))
    with pytest.raises(CheckpointError, match="the state lacks 'bias'"):
        bind(model, {"weight": torch.zeros(3, 2)})
    with pytest.raises(ShapeError, match="'weight': the model has shape"):
        bind(model, {"weight": torch.zeros(3, 3), "bias": torch.zeros(3)})


def test_bind_refuses_tied_tensors_with_two_values() -> None:
    state = {"embed.weight": torch.zeros(5, 3), "head.weight": torch.ones(5, 3)}
    with pytest.raises(
        CheckpointError, match=r"'embed\.weight' and 'head\.weight' are one tensor in the model"
    ):
        bind(Tied(), state)


def test_bind_refuses_names_it_cannot_put_in_place() -> None:
    model = nn.Linear(2, 2)
    model.register_state_dict_post_hook(
        lambda module, state, prefix, meta: state.update(renamed=state.pop(prefix + "weight"))
    )
    with pytest.raises(CheckpointError, match="'renamed' is no parameter or buffer"):
        bind(model, state_of(model))


def test_bind_refuses_outputs_that_are_labels() -> None:
    class Labels(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.argmax(-1)

    with pytest.raises(ModelError, match=r"floating outputs to be scored, found torch\.int64"):
        bind(Labels())(Batch((torch.ones(2, 3),)))


def test_data_that_do_not_fit_the_model_are_named() -> None:
    model = nn.Linear(3, 2)
    for state in (None, snapshot(model.state_dict())):
        with pytest.raises(
            ModelError, match=r"Linear on a batch with inputs \(4, 5\) failed.*fit the model\?"
        ):
            bind(model, state)(Batch((torch.zeros(4, 5),)))
    with pytest.raises(ModelError, match=r"inputs \(4, 3\), mask of int failed with TypeError"):
        bind(model)(Batch((torch.zeros(4, 3),), {"mask": 1}))

    class OutOfMemory(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            raise torch.OutOfMemoryError

    with pytest.raises(torch.OutOfMemoryError):
        bind(OutOfMemory(3, 2))(Batch((torch.zeros(4, 3),)))


def test_cross_entropy_by_hand() -> None:
    found = score(torch.tensor([[0.0, 0.0], [0.0, math.log(3.0)]]), torch.tensor([0, 0]))
    torch.testing.assert_close(found.losses, torch.tensor([math.log(2), math.log(4)]).double())
    assert found.correct is not None
    assert found.correct.tolist() == [1.0, 0.0]
    assert found.losses.dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_scores_agree_with_torch_in_every_layout(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4, 6, 3, generator=generator, dtype=torch.float64).to(dtype)
    labels = torch.randint(3, (4, 6), generator=generator)
    wanted = nn.functional.cross_entropy(logits.double().movedim(-1, 1), labels, reduction="none").mean(1)
    for outputs in (logits, logits.movedim(-1, 1)):
        found = score(outputs, labels)
        torch.testing.assert_close(found.losses, wanted, rtol=1e-5, atol=1e-6)
        assert found.correct is not None
        torch.testing.assert_close(found.correct, (logits.argmax(-1) == labels).double().mean(1))


def test_squared_error_by_hand() -> None:
    found = score(torch.tensor([[1.0, 2.0], [0.0, 0.0]]), torch.tensor([[0.0, 0.0], [3.0, 1.0]]), "mse")
    assert found.losses.tolist() == [2.5, 5.0]
    assert found.correct is None
    column = score(torch.tensor([[1.0], [2.0]]), torch.tensor([0.0, 0.0]), "mse")
    assert column.losses.tolist() == [1.0, 4.0]


def test_a_loss_function_scores_examples() -> None:
    def margin(outputs: Tensor, targets: Tensor) -> Tensor:
        return outputs.amax(-1) - outputs.gather(-1, targets[:, None]).squeeze(-1)

    found = score(torch.tensor([[1.0, 4.0], [0.0, 2.0]]), torch.tensor([0, 1]), margin)
    assert found.losses.tolist() == [3.0, 0.0]
    assert found.correct is not None
    assert found.correct.tolist() == [0.0, 1.0]
    ignoring = score(torch.ones(2, 2), torch.tensor([0, -100]), lambda f, y: f.sum(-1))
    assert ignoring.correct is None
    assert score(torch.ones(2, 2), torch.ones(2, 2), lambda f, y: f.sum(-1)).correct is None


def test_score_refuses_bad_targets() -> None:
    outputs = torch.zeros(3, 4)
    with pytest.raises(DataError, match="has no targets"):
        score(outputs, None)
    with pytest.raises(DataError, match=r"Labels run from 0 to 4, but .* 4 outputs: expected 0\.\.3"):
        score(outputs, torch.tensor([0, 1, 4]))
    with pytest.raises(DataError, match="Labels run from -1 to 1"):
        score(outputs, torch.tensor([0, 1, -1]))
    with pytest.raises(DataError, match=r"needs class indices, found targets of torch\.float32"):
        score(outputs, torch.zeros(3))
    with pytest.raises(ShapeError, match=r"Cross-entropy of outputs \(3, 4\) and targets \(3, 1\)"):
        score(outputs, torch.zeros(3, 1, dtype=torch.int64))
    with pytest.raises(ShapeError, match=r"Squared error of outputs \(3, 4\) and targets \(3,\)"):
        score(outputs, torch.zeros(3), "mse")
    with pytest.raises(ShapeError, match=r"returned \(\) for 3 examples"):
        score(outputs, torch.zeros(3), lambda f, y: f.sum())
    with pytest.raises(ShapeError, match="returned float for 3 examples"):
        score(outputs, torch.zeros(3), lambda f, y: 1.0)  # type: ignore[arg-type,return-value]
    with pytest.raises(DataError, match="Unknown loss 'hinge'"):
        score(outputs, torch.zeros(3), "hinge")


def test_class_axis() -> None:
    dense = torch.zeros(2, 3, 5, 7)
    assert class_axis_last(dense, torch.zeros(2, 5, 7)).shape == (2, 5, 7, 3)  # type: ignore[union-attr]
    assert class_axis_last(dense, torch.zeros(2, 3, 5)) is dense
    assert class_axis_last(dense, torch.zeros(2, 4, 4)) is None
    assert class_axis_last(dense, torch.zeros(2)) is None
    assert class_axis_last(torch.zeros(2), torch.zeros(2)) is None


def test_evaluate_is_the_mean_over_examples_in_any_order() -> None:
    model = seeded(lambda: nn.Linear(3, 4).double())
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(10, 3, generator=generator).double(), torch.randint(4, (10,), generator=generator)
    whole = evaluate(model, [(x, y)])
    pieces = evaluate(model, ((x[i : i + 3], y[i : i + 3]) for i in (9, 3, 0, 6)))
    logits = model(x).detach()
    assert whole.loss == pytest.approx(float(nn.functional.cross_entropy(logits, y)), rel=1e-6)
    assert whole.accuracy == float((logits.argmax(1) == y).double().mean())
    assert pieces.loss == pytest.approx(whole.loss, rel=1e-12)
    assert pieces.accuracy == pytest.approx(whole.accuracy)
    assert pieces.examples == whole.examples == 10
    assert evaluate(model, [(x, x[:, :1].expand(10, 4))], loss="mse").accuracy is None
    other = seeded(lambda: nn.Linear(3, 4).double(), 1)
    assert evaluate(model, [(x, y)], state=state_of(other)) == evaluate(other, [(x, y)])


def test_evaluate_refuses_bad_input() -> None:
    model = seeded(lambda: nn.Linear(3, 4))
    with pytest.raises(DataError, match="expected at least one batch, found none"):
        evaluate(model, [])
    with pytest.raises(ModelError, match="The loss of the model is NaN or infinite on 1 of 2 examples"):
        evaluate(model, [(torch.tensor([[0.0, 0.0, 0.0], [float("nan"), 0.0, 0.0]]), torch.tensor([0, 1]))])
    with pytest.raises(ModelError, match="NaN or infinite on 1 of 1"):
        require_finite(torch.tensor([float("inf")]), "It")
    with pytest.raises(ModelError, match="training mode"):
        evaluate(nn.Sequential(nn.Dropout()).train(), [(torch.ones(1, 3), torch.tensor([0]))])


@pytest.mark.parametrize(
    "module",
    [
        nn.Dropout(0.1),
        nn.Dropout2d(0.1),
        nn.AlphaDropout(0.1),
        nn.FeatureAlphaDropout(0.1),
        nn.BatchNorm1d(2),
        nn.BatchNorm3d(2),
        nn.SyncBatchNorm(2),
        nn.InstanceNorm2d(2, track_running_stats=True),
        nn.RReLU(),
        nn.MultiheadAttention(2, 1, dropout=0.1),
        nn.LSTM(2, 2, num_layers=2, dropout=0.1),
    ],
    ids=lambda m: type(m).__name__,
)
def test_training_mode_is_named(module: nn.Module) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(module))
    with pytest.raises(ModelError, match=rf"1\.0 \({type(module).__name__}\).*Call model\.eval\(\) first"):
        require_evaluation(model.train())
    require_evaluation(model.eval())


@pytest.mark.parametrize(
    "module",
    [
        nn.Linear(2, 2),
        nn.Dropout(0.0),
        nn.BatchNorm1d(2, track_running_stats=False),
        nn.InstanceNorm1d(2),
        nn.RReLU(0.2, 0.2),
        nn.MultiheadAttention(2, 1),
        nn.GRU(2, 2),
    ],
    ids=lambda m: type(m).__name__,
)
def test_training_mode_without_effect_passes(module: nn.Module) -> None:
    require_evaluation(nn.Sequential(module).train())


def test_a_state_is_no_module() -> None:
    with pytest.raises(
        ModelError, match=r"Net A: expected a torch\.nn\.Module.*found OrderedDict. Load the state"
    ):
        require_evaluation(nn.Linear(2, 2).state_dict(), "Net A")  # type: ignore[arg-type]


def test_many_guilty_modules_are_counted() -> None:
    with pytest.raises(ModelError, match=r"Net A is in training mode: .* and 2 more"):
        require_evaluation(nn.Sequential(*[nn.Dropout() for _ in range(5)]), "Net A")
    with pytest.raises(ModelError, match=r"Dropout \(Dropout\)"):
        require_evaluation(nn.Dropout())


class Noisy(nn.Module):
    def __init__(self, size: float) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)
        self.size = size

    def forward(self, x: Tensor) -> Tensor:
        out = self.linear(x)
        return out + self.size * torch.randn_like(out)


def test_randomness_in_evaluation_is_found_and_the_random_state_kept() -> None:
    batch = as_batch((torch.ones(2, 3), torch.tensor([0, 1])))
    before = torch.random.get_rng_state()
    with pytest.raises(ModelError, match="Model A is random in evaluation: two runs"):
        require_deterministic(seeded(lambda: Noisy(0.01)), batch, name="Model A")
    require_deterministic(seeded(lambda: Noisy(0.0)), batch)
    assert torch.equal(before, torch.random.get_rng_state())


def test_relative_difference() -> None:
    nan = float("nan")
    assert relative_difference(torch.tensor([2.0, -4.0]), torch.tensor([2.0, -3.0])) == 0.25
    assert relative_difference(torch.tensor([nan, 1.0]), torch.tensor([nan, 1.0])) == 0.0
    assert relative_difference(torch.tensor([1.0, 1.0]), torch.tensor([nan, 1.0])) == math.inf
    assert relative_difference(torch.zeros(1), torch.ones(1)) > 1e30
    assert relative_difference(torch.zeros(0), torch.zeros(0)) == 0.0
    assert relative_difference(torch.zeros(2), torch.zeros(3)) == math.inf


def total(tensors: list[Tensor]) -> Tensor:
    return torch.stack(tensors).sum(0)


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.complex64], ids=str
)
def test_combine_keeps_dtypes_and_inputs(dtype: torch.dtype) -> None:
    a = {"w": torch.tensor([1.0, 2.0]).to(dtype), "n": torch.tensor(7), "mask": torch.tensor([True])}
    b = {"w": torch.tensor([3.0, 5.0]).to(dtype), "n": torch.tensor(9), "mask": torch.tensor([False])}
    before = snapshot(a), snapshot(b)
    found = combine_states([a, b], total)
    assert torch.equal(found["w"], torch.tensor([4.0, 7.0]).to(dtype))
    assert found["w"].dtype == dtype
    assert found["n"] == 7
    assert found["mask"].item() is True
    found["n"].add_(1)
    assert unchanged(a, before[0])
    assert unchanged(b, before[1])


def test_combine_never_returns_an_input() -> None:
    a = {"w": torch.ones(2, dtype=torch.float64)}
    found = combine_states([a], lambda tensors: tensors[0])
    found["w"].zero_()
    assert a["w"].tolist() == [1.0, 1.0]


def test_combine_sums_low_precision_in_float64() -> None:
    states = [{"w": torch.tensor([256.0], dtype=torch.bfloat16)}] + [
        {"w": torch.tensor([1.0], dtype=torch.bfloat16)} for _ in range(4)
    ]
    assert combine_states(states, total)["w"].item() == 260.0


def test_tied_tensors_stay_tied() -> None:
    a, b = state_of(seeded(Tied, 0)), state_of(seeded(Tied, 1))
    both = combine_states([a, b], total)
    assert both["embed.weight"] is both["head.weight"]
    from_file = snapshot(b)
    loaded = combine_states([a, from_file], total)
    assert loaded["embed.weight"] is loaded["head.weight"]
    from_file["head.weight"] = from_file["head.weight"] + 1
    untied = combine_states([a, from_file], total)
    assert not torch.equal(untied["embed.weight"], untied["head.weight"])
    three = combine_states([a, b, from_file], total)
    assert not torch.equal(three["embed.weight"], three["head.weight"])
    # rows of one storage are no ties, and neither are empty or meta tensors
    storage = torch.arange(4.0)
    views = combine_states([{"x": storage[:2], "y": storage[2:]}], total)
    assert views["y"].tolist() == [2.0, 3.0]
    empty = combine_states([{"x": torch.zeros(0, 2), "y": torch.zeros(0, 2)}], total)
    assert empty["x"] is not empty["y"]
    meta = combine_states([{"x": torch.zeros(2, device="meta"), "y": torch.zeros(2, device="meta")}], total)
    assert meta["x"] is not meta["y"]


def test_combine_checks_its_inputs() -> None:
    good = {"w": torch.zeros(2)}
    with pytest.raises(CheckpointError, match="model 0 and model 1 are different architectures"):
        combine_states([good, {"v": torch.zeros(2)}], total)
    with pytest.raises(CheckpointError, match="right: 'w' has 1 NaN or infinite of 2 entries"):
        combine_states([good, {"w": torch.tensor([0.0, float("nan")])}], total, names=("left", "right"))
    with pytest.raises(ShapeError, match="'w': model 0 has shape"):
        combine_states([good, {"w": torch.zeros(3)}], total)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    "dtype",
    [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e5m2, torch.complex64],
)
def test_no_entry_that_is_not_finite_passes(dtype: torch.dtype, bad: float) -> None:
    for shape in ((), (3,), (2, 3), (0,)):
        tensor = torch.ones(shape).to(dtype)
        check_finite({"x": tensor})
        if tensor.numel():
            tensor = torch.tensor([1.0] * (tensor.numel() - 1) + [bad]).to(dtype)
            with pytest.raises(CheckpointError, match="'x' has 1 NaN or infinite of"):
                check_finite({"x": tensor})
