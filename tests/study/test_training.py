"""Training: the protocol to the letter, deterministic in its seed, and clear when it fails."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from isthmus.errors import ModelError
from isthmus.study import (
    FAMILIES,
    Dataset,
    EpochRecord,
    StudyError,
    TrainSettings,
    derive_seed,
    initialise,
    load_dataset,
    network_for,
    train,
)
from isthmus.testing import mlp, resnet20
from isthmus.training._networks import operations


def toy(count: int = 37, features: int = 6, classes: int = 3) -> Dataset:
    generator = torch.Generator().manual_seed(0)
    values = torch.rand(count, features, generator=generator)
    return Dataset("toy", "train", values, values[:, :classes].argmax(1), tuple("abcdefgh"[:classes]))


def images(count: int = 12) -> Dataset:
    values = torch.randint(0, 256, (count, 3, 32, 32), generator=torch.Generator().manual_seed(0))
    return Dataset("toy images", "train", values.byte(), torch.arange(count) % 10, tuple("0123456789"), 255.0)


def settings(**changes: Any) -> TrainSettings:
    return TrainSettings(
        **{"learning_rate": 0.1, "batch_size": 10, "epochs": 2, "warmup_steps": 3, **changes}
    )


def network() -> nn.Module:
    return mlp(6, 8, 2, 3)


def states_equal(a: nn.Module, b: nn.Module) -> bool:
    left, right = a.state_dict(), b.state_dict()
    return all(torch.equal(v, right[k]) for k, v in left.items())


# --- The schedule ------------------------------------------------------------------------------------------


def test_the_schedule_of_the_paper() -> None:
    s = TrainSettings(learning_rate=0.5)
    steps = 50 * 120
    assert s.learning_rate_at(0, steps) == 1e-6
    assert s.learning_rate_at(5, steps) == pytest.approx((0.5 + 1e-6) / 2)
    assert s.learning_rate_at(10, steps) == 0.5
    assert s.learning_rate_at(10 + (steps - 10) // 2, steps) == pytest.approx(0.25)
    assert s.learning_rate_at(steps, steps) == pytest.approx(0, abs=1e-12)
    rates = [s.learning_rate_at(k, steps) for k in range(steps)]
    assert max(rates) == rates[10]
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[-1] > 0


def test_other_schedules() -> None:
    constant = TrainSettings(learning_rate=0.5, schedule="constant", warmup_steps=0)
    assert {constant.learning_rate_at(k, 9) for k in range(9)} == {0.5}
    short = TrainSettings(learning_rate=0.5)
    assert [short.learning_rate_at(k, 3) for k in range(3)] == pytest.approx([1e-6, 0.05, 0.1], rel=1e-4)
    exact = TrainSettings(learning_rate=0.5, warmup_steps=4)
    assert exact.learning_rate_at(4, 4) == 0.5


# --- Against a loop written by hand ------------------------------------------------------------------------


def by_hand(model: nn.Module, data: Dataset, s: TrainSettings, order: torch.Generator) -> list[float]:
    """Train in place with the update rules spelt out; return the mean loss of each epoch."""
    parameters = list(model.parameters())
    first = [torch.zeros_like(p) for p in parameters]
    second = [torch.zeros_like(p) for p in parameters]
    batches = math.ceil(len(data) / s.batch_size)
    losses, step = [], 0
    for _ in range(s.epochs):
        shuffled, total = torch.randperm(len(data), generator=order), 0.0
        for k in range(batches):
            size = len(data) // batches + (1 if k < len(data) % batches else 0)
            index, shuffled = shuffled[:size], shuffled[size:]
            loss = -F.log_softmax(model(data.inputs[index]), 1)[range(size), data.labels[index]].mean()
            gradients = torch.autograd.grad(loss, parameters)
            rate = s.learning_rate_at(step, s.epochs * batches)
            step += 1
            with torch.no_grad():
                for p, g, m, v in zip(parameters, gradients, first, second, strict=True):
                    if s.optimiser == "sgd":
                        m.mul_(s.momentum).add_(g + s.weight_decay * p)
                        p.sub_(rate * m)
                    else:
                        p.mul_(1 - rate * s.weight_decay)
                        m.mul_(0.9).add_(0.1 * g)
                        v.mul_(0.999).add_(0.001 * g * g)
                        scale = (v / (1 - 0.999**step)).sqrt() + 1e-8
                        p.sub_(rate * (m / (1 - 0.9**step)) / scale)
            total += float(loss.detach()) * size
        losses.append(total / len(data))
    return losses


@pytest.mark.parametrize("optimiser", ["sgd", "adam"])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("count", [1, 2, 20, 37])
def test_a_loop_written_by_hand_gives_the_same(optimiser: Any, weight_decay: float, count: int) -> None:
    data = toy(count)
    s = settings(optimiser=optimiser, weight_decay=weight_decay, learning_rate=0.05, epochs=3, seed=5)
    result = train(network(), data, s)
    model = initialise(network(), s.seed)
    order = torch.Generator().manual_seed(derive_seed(s.seed, "order"))
    losses = by_hand(model, data, s, order)
    assert [r.loss for r in result.history] == pytest.approx(losses, rel=1e-5)
    for trained, expected in zip(result.model.parameters(), model.parameters(), strict=True):
        assert torch.allclose(trained, expected, rtol=1e-4, atol=1e-6)
    steps = 3 * math.ceil(count / 10)
    assert result.history[-1].learning_rate == s.learning_rate_at(steps - 1, steps)


def test_frozen_parameters_stay() -> None:
    model = network()
    model.get_parameter("layers.0.weight").requires_grad_(False)
    result = train(model, toy(), settings(initialisation="keep"))
    assert torch.equal(result.model.get_parameter("layers.0.weight"), model.get_parameter("layers.0.weight"))
    assert not torch.equal(
        result.model.get_parameter("layers.1.weight"), model.get_parameter("layers.1.weight")
    )


# --- Determinism -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimiser", ["sgd", "adam"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_same_seed_gives_the_same_bits(optimiser: Any, precision: Any) -> None:
    s = settings(optimiser=optimiser, precision=precision)
    runs = [train(network(), toy(), s) for _ in range(2)]
    assert states_equal(runs[0].model, runs[1].model)
    assert [(r.loss, r.accuracy) for r in runs[0].history] == [(r.loss, r.accuracy) for r in runs[1].history]
    assert not states_equal(runs[0].model, train(network(), toy(), replace(s, seed=1)).model)


def test_two_seeds_differ_in_initial_values_and_in_order() -> None:
    start = [train(network(), toy(), settings(epochs=0, seed=s)).model for s in (0, 1)]
    assert not states_equal(*start)
    kept = network()
    ordered = [train(kept, toy(), settings(initialisation="keep", seed=s)).model for s in (0, 1)]
    assert not states_equal(*ordered)


def test_layers_that_draw_at_random_follow_the_seed_and_leave_the_global_generator_alone() -> None:
    model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, 3))
    torch.manual_seed(1)
    first = train(model, toy(), settings()).model
    torch.manual_seed(2)
    before = torch.get_rng_state()
    second = train(model, toy(), settings()).model
    assert torch.equal(torch.get_rng_state(), before)
    assert states_equal(first, second)


# --- What comes out ----------------------------------------------------------------------------------------


def test_the_model_given_is_not_changed() -> None:
    model = resnet20(width=1 / 8)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    result = train(model, images(), settings(epochs=1))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert model.training
    assert not result.model.training
    assert int(result.model.state_dict()["bn1.num_batches_tracked"]) == 2
    assert all(v.is_contiguous() for v in result.model.state_dict().values())


def test_history_and_callback() -> None:
    seen: list[EpochRecord] = []
    result = train(network(), toy(), settings(epochs=3), on_epoch=seen.append)
    assert tuple(seen) == result.history
    assert [r.epoch for r in seen] == [1, 2, 3]
    assert all(0 <= r.accuracy <= 1 and r.loss > 0 for r in seen)
    assert [r.seconds for r in seen] == sorted(r.seconds for r in seen)
    assert result.seconds >= seen[-1].seconds
    assert (result.status, result.settings) == ("finished", settings(epochs=3))
    nothing = train(network(), toy(), settings(epochs=0))
    assert (nothing.history, nothing.status) == ((), "finished")


def test_digits_are_learnt_in_both_precisions() -> None:
    digits, test = load_dataset("digits"), load_dataset("digits", split="test")
    losses = {}
    for precision in ("float32", "bfloat16"):
        s = settings(learning_rate=0.1, batch_size=50, epochs=8, precision=precision)
        result = train(network_for("mlp", digits, width=64, depth=2), digits, s)
        with torch.no_grad():
            right = (result.model(test.inputs).argmax(1) == test.labels).double().mean()
        assert float(right) > 0.93
        assert all(p.dtype == torch.float32 for p in result.model.parameters())
        losses[precision] = result.history[-1].loss
    assert losses["float32"] != losses["bfloat16"]
    assert losses["bfloat16"] == pytest.approx(losses["float32"], rel=0.1)


@pytest.mark.gpu
def test_training_follows_the_device_of_the_model() -> None:
    on_cpu = train(network(), toy(), settings())
    on_gpu = train(network().cuda(), toy(), settings())
    assert next(on_gpu.model.parameters()).device.type == "cuda"
    assert [r.loss for r in on_gpu.history] == pytest.approx([r.loss for r in on_cpu.history], rel=1e-3)


# --- What goes wrong ---------------------------------------------------------------------------------------


def test_divergence_is_an_error_or_a_status() -> None:
    s = settings(learning_rate=1e30, warmup_steps=0, epochs=9)
    with pytest.raises(
        StudyError, match=r"diverged: the loss was (nan|inf) in epoch \d of 9 with sgd at learning rate"
    ):
        train(network(), toy(), s)
    result = train(network(), toy(), s, strict=False)
    assert result.status == "diverged"
    assert len(result.history) < 9
    assert not math.isfinite(result.history[-1].loss)
    assert all(math.isfinite(r.loss) for r in result.history[:-1])


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_interruptions_reach_the_caller_and_leave_the_model_alone(error: type[BaseException]) -> None:
    model = network()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    rng = torch.get_rng_state()

    def stop(record: EpochRecord) -> None:
        if record.epoch == 2:
            raise error

    with pytest.raises(error):
        train(model, toy(), settings(epochs=5), on_epoch=stop)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), rng)


class Wrong(nn.Module):
    def __init__(self, value: Any) -> None:
        super().__init__()
        self.weight, self.value = nn.Parameter(torch.ones(1)), value

    def forward(self, x: Tensor) -> Any:
        return self.value


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (mlp(5, 4, 1, 3), r"does not accept inputs of shape \(2, 6\) from toy: .*Build it for this data set"),
        (mlp(6, 4, 1, 2), r"expected logits of shape \(2, 3\) for the 3 classes of toy, found \(2, 2\)"),
        (Wrong(torch.zeros(2)), r"found \(2,\)"),
        (Wrong(torch.zeros(1, 3)), r"found \(1, 3\)"),
        (Wrong("logits"), "Expected the model to return a tensor"),
        (nn.ReLU(), "no parameters that can be trained"),
    ],
)
def test_models_that_do_not_fit(model: nn.Module, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        train(model, toy(), settings(initialisation="keep"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optimiser": "lion"}, "optimiser: expected one of sgd, adam, found 'lion'"),
        ({"schedule": "linear"}, "schedule: expected one of cosine, constant"),
        ({"precision": "float16"}, "precision: expected one of float32, bfloat16"),
        ({"initialisation": "zeros"}, "initialisation: expected one of lecun_normal, he_normal, torch, keep"),
        ({"learning_rate": 0.0}, "learning_rate: expected a positive number, found 0.0"),
        ({"learning_rate": float("nan")}, "learning_rate: expected a positive number, found nan"),
        ({"momentum": 1.0}, r"momentum: expected a number in \[0, 1\), found 1.0"),
        ({"batch_size": 0}, "batch_size: expected a finite number of at least 1, found 0"),
        ({"epochs": -1}, "epochs: expected a finite number of at least 0, found -1"),
        ({"warmup_steps": -1}, "warmup_steps: expected a finite number of at least 0"),
        ({"weight_decay": -0.1}, "weight_decay: expected a finite number of at least 0"),
        ({"warmup_from": float("inf")}, "warmup_from: expected a finite number of at least 0, found inf"),
    ],
)
def test_settings_out_of_range(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(StudyError, match=message):
        TrainSettings(**changes)


# --- Initial values ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("how", "gain"), [("lecun_normal", 1.0), ("he_normal", 2**0.5)])
def test_normal_initial_values_have_the_right_spread_and_are_cut_off(how: Any, gain: float) -> None:
    model = nn.ModuleDict(
        {
            "linear": nn.Linear(400, 300),
            "conv": nn.Conv2d(32, 100, 3, groups=2),
            "up": nn.ConvTranspose2d(60, 80, 4, groups=2),
        }
    )
    fresh = initialise(model, 0, how)
    for name, fan_in in (("linear", 400), ("conv", 16 * 9), ("up", 30 * 16)):
        weight = fresh.get_parameter(f"{name}.weight").detach()
        scale = fan_in**0.5 / gain
        assert float(weight.std()) * scale == pytest.approx(1, rel=0.02)
        assert float(weight.abs().max()) * scale <= 2 / 0.8796256610342398 + 1e-5
        assert float(weight.abs().max()) * scale > 2.2
        assert not fresh.get_parameter(f"{name}.bias").any()


def test_initialising_is_seeded_pure_and_resets_norms() -> None:
    model = resnet20(width=1 / 8)
    for p in model.parameters():
        nn.init.constant_(p, 3.0)
    model.get_buffer("bn1.running_var").fill_(5.0)
    before, rng = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    for how in ("lecun_normal", "he_normal", "torch"):
        fresh, again, other = (initialise(model, s, how) for s in (1, 1, 2))
        assert states_equal(fresh, again)
        assert not states_equal(fresh, other)
        assert torch.equal(fresh.state_dict()["bn1.running_var"], torch.ones(2))
        assert torch.equal(fresh.state_dict()["bn1.weight"], torch.ones(2))
        assert not (fresh.state_dict()["conv1.weight"] == 3.0).any()
    assert states_equal(initialise(model, 1, "keep"), model)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), rng)


def test_layers_of_other_kinds_reset_themselves_from_the_seed() -> None:
    model = nn.Sequential(nn.Embedding(5, 4), nn.LSTM(4, 3))
    unknown: Any = "zeros"
    with pytest.raises(
        StudyError,
        match="initialisation: expected one of lecun_normal, he_normal, torch, keep, found 'zeros'",
    ):
        initialise(model, 0, unknown)
    assert states_equal(initialise(model, 1), initialise(model, 1))
    assert not states_equal(initialise(model, 1), initialise(model, 2))
    with pytest.raises(ModelError, match=r"1 \(Wrong\) has parameters of its own but no reset_parameters"):
        initialise(nn.Sequential(nn.Linear(2, 2), Wrong(None)), 0)


def test_seeds_are_derived_from_a_digest() -> None:
    # Frozen: a change here changes every trained network.
    assert derive_seed(0, "order") == 4912484547447678509
    seeds = {
        derive_seed(s, *p) for s in (0, 1, -1, 10**20) for p in ((), ("a",), ("b",), ("a", "b"), ("ab",))
    }
    assert len(seeds) == 20
    assert all(0 <= s < 2**63 for s in seeds)


# --- Networks for a data set -------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_trains_on_images(family: str) -> None:
    model = network_for(family, images(), width=8 if family == "mlp" else 1 / 4)
    assert model.training
    result = train(model, images(), settings(epochs=1, batch_size=6))
    assert math.isfinite(result.history[0].loss)


def test_the_mlp_is_sized_to_the_data() -> None:
    digits = load_dataset("digits")
    shapes = [tuple(p.shape) for p in network_for("mlp", digits, depth=1, bias=False).parameters()]
    assert shapes == [(512, 64), (10, 512)]
    assert len(list(network_for("mlp", toy(), width=7).parameters())) == 8


def test_operations_of_a_network_are_counted_on_shapes() -> None:
    digits = load_dataset("digits")
    model, example = network_for("mlp", digits, width=7, depth=2), torch.zeros(1, *digits.input_shape)
    before = copy.deepcopy(model.state_dict())
    assert operations(model, example) == 2 * (64 * 7 + 7 * 7 + 7 * 10)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert model.training
    # Three by three convolutions at 32, 16 and 8 pixels a side; short cuts between the stages are what may come on top.
    products = (
        1024 * 9 * (3 * 16 + 6 * 16**2) + 256 * 9 * (16 * 32 + 5 * 32**2) + 64 * 9 * (32 * 64 + 5 * 64**2)
    )
    found = operations(network_for("resnet20", images()), torch.zeros(1, 3, 32, 32)) - 2 * (
        products + 64 * 10
    )
    assert found in (0, 2 * (256 * 16 * 32 + 64 * 32 * 64))


def test_networks_that_do_not_exist_or_do_not_fit() -> None:
    with pytest.raises(ModelError, match=r"Unknown network family 'lenet'. Choose one of mlp, vgg16"):
        network_for("lenet", toy())
    with pytest.raises(
        ModelError, match=r"'vgg16' cannot take the inputs of digits, shape \(1, 8, 8\).*use 'mlp'"
    ):
        network_for("vgg16", load_dataset("digits"), width=1 / 16)
    for width in (0.5, 12.5):
        with pytest.raises(ModelError, match=f"'mlp': width: expected a number of units, found {width}"):
            network_for("mlp", toy(), width=width)
    with pytest.raises(ModelError, match=r"'resnet20': .*unexpected keyword argument 'layers'"):
        network_for("resnet20", images(), layers=3)
