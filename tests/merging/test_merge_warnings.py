"""What a merge says of itself: running statistics left behind, strangers, and sums that must not overflow."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from isthmus import align
from isthmus.connectivity import interpolate
from isthmus.errors import IsthmusWarning
from isthmus.merging import merge
from isthmus.moments import refresh_batchnorm
from isthmus.states import State, state_of
from isthmus.study import TrainSettings, load_dataset, network_for, train

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def seeded(seed: int, norm: bool = True, width: int = 24) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        between = nn.BatchNorm1d(width) if norm else nn.LayerNorm(width)
        model = nn.Sequential(nn.Linear(9, width), between, nn.ReLU(), nn.Linear(width, 5))
        model.train()(torch.randn(100, 9))
    return model.eval()


def data(count: int = 50) -> Tensor:
    return 2 * torch.randn(count, 9, generator=torch.Generator().manual_seed(0)) + 1


def merged(*given: Any, **options: Any) -> tuple[State, list[str]]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        state = merge(*given, **options)
    assert all(w.filename == __file__ for w in caught)  # the caller's line
    return state, [str(w.message) for w in caught if issubclass(w.category, IsthmusWarning)]


def spoken_of(told: list[str]) -> set[str]:
    return {"statistics" if "running statistics" in text else "strangers" for text in told}


def near(model: nn.Module, seed: int = 5) -> nn.Module:
    """A network with the same start: all tensors a little off."""
    g = torch.Generator().manual_seed(seed)
    other = seeded(0)
    other.load_state_dict(
        {
            k: v + 0.1 * v.abs().mean() * torch.randn(v.shape, generator=g) if v.is_floating_point() else v
            for k, v in model.state_dict().items()
        }
    )
    return other


# --- Running statistics -----------------------------------------------------------------------------------------


def test_with_batches_they_are_recomputed() -> None:
    a = seeded(0)
    b = near(a)
    wanted = refresh_batchnorm(a, interpolate(a, b, 0.5), [data()])
    for models, model in (([a, b], None), ([state_of(a), state_of(b)], a)):
        found, told = merged(models, batches=[data()], model=model)
        assert told == []
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-7)
    found, _ = merged([a, b], batches=iter([data()]))
    assert found._metadata["1"] == {"version": 2}  # type: ignore[attr-defined]


@pytest.mark.parametrize("refresh", ["auto", None, "none"])
def test_without_batches_the_average_is_told(refresh: str | None) -> None:
    a = seeded(0)
    found, told = merged([a, near(a)], refresh=refresh)
    assert len(told) == 1
    assert told[0].startswith(
        "The merged running statistics (1) are the average of the networks', which is wrong"
    )
    torch.testing.assert_close(found, interpolate(a, near(a), 0.5))
    _, told = merged([state_of(a), state_of(near(a))], batches=[data()], refresh=refresh)
    assert spoken_of(told) == {"statistics"}
    assert "model=..., the architecture" in told[0]


def test_told_off_with_batches() -> None:
    a = seeded(0)
    found, told = merged([a, near(a)], batches=[data()], refresh=None)
    assert spoken_of(told) == {"statistics"}
    torch.testing.assert_close(found, interpolate(a, near(a), 0.5))


def test_one_network_alone_stays_as_it_was_trained() -> None:
    a = seeded(0)
    for models, weights in (([a, near(a)], [1.0, 0.0]), ([a, near(a)], [0.0, 1.0]), ([a, a, a], None)):
        for batches in ([data()], None):
            found, told = merged(models, weights, batches=batches)
            assert told == []
            kept = models[1] if weights == [0.0, 1.0] else a
            for name, value in kept.state_dict().items():
                if value.is_floating_point():
                    assert torch.equal(found[name], value)


def test_a_function_is_left_in_peace() -> None:
    a = seeded(0)
    assert merged([a, near(a)], refresh=lambda state: state)[1] == []


def test_without_running_statistics_nothing_is_run() -> None:
    a = seeded(0, norm=False)
    b = seeded(0, norm=False)
    b[0].bias.data += 0.1  # type: ignore[union-attr,operator]

    def never() -> Any:
        raise AssertionError("the data were read")
        yield

    class Data:
        def __iter__(self) -> Any:
            return never()

    found, told = merged([a, b], batches=Data())
    assert told == []
    torch.testing.assert_close(found, interpolate(a, b, 0.5))


# --- Strangers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [6, 24, 300])
def test_strangers_are_named(width: int) -> None:
    a, b = seeded(0, norm=False, width=width), seeded(1, norm=False, width=width)
    _, told = merged([a, near_plain(a), b])
    assert len(told) == 1
    assert told[0].startswith("The weights of model 2 (")
    assert "do not share a start" in told[0]
    assert 'Align first: align="weights" or alignments=[...]' in told[0]
    assert spoken_of(merged([state_of(a), state_of(b)])[1]) == {"strangers"}
    assert spoken_of(merged([a, b], alignments=[None])[1]) == {"strangers"}
    assert merged([a, b], [1.0, 0.0])[1] == merged([a, b], [0.0, 1.0])[1] == []


def near_plain(model: nn.Module) -> State:
    g = torch.Generator().manual_seed(3)
    return {k: v + 0.3 * v.std() * torch.randn(v.shape, generator=g) for k, v in state_of(model).items()}


def test_a_relabelled_copy_is_a_stranger_until_it_is_aligned() -> None:
    a = seeded(0, norm=False, width=48)
    order = torch.randperm(48, generator=torch.Generator().manual_seed(0))
    state = state_of(a)
    b = {k: (v[:, order] if k == "3.weight" else v if k == "3.bias" else v[order]) for k, v in state.items()}
    assert spoken_of(merged([a, b])[1]) == {"strangers"}
    found = align(a, b, args=(data(4),), method="weights")
    assert merged([a, found.apply(b)])[1] == []
    assert merged([a, b], alignments=[found])[1] == []
    assert merged([a, b], align="weights", args=(data(4),))[1] == []


def test_trained_networks() -> None:
    """Digits: strangers are told apart from networks of one start, and from strangers that were aligned."""
    digits = load_dataset("digits")
    how = TrainSettings(learning_rate=0.1, batch_size=64, epochs=3, seed=0)

    def trained(seed: int) -> nn.Module:
        network = network_for("mlp", digits, width=64, depth=2)
        settings = TrainSettings(**{**vars(how), "seed": seed})
        return train(network, digits, settings).model.eval()

    a, b = trained(0), trained(1)
    assert spoken_of(merged([a, b])[1]) == {"strangers"}
    assert merged([a, align(a, b, args=(digits.values[:4].float(),), method="weights").apply(b)])[1] == []
    start = state_of(a)
    g = torch.Generator().manual_seed(0)
    tuned = {k: v + v.std() * torch.randn(v.shape, generator=g) for k, v in start.items()}
    assert merged([a, tuned])[1] == []  # noise as large as the weights: a common start all the same


def test_what_has_no_matrices_is_not_judged() -> None:
    assert merged([{"w": torch.ones(5)}, {"w": -torch.ones(5)}])[1] == []
    assert merged([{"w": torch.zeros(5, 5)}, {"w": torch.zeros(5, 5) + 1e-3}])[1] == []


# --- Sums -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_largest_numbers_average_without_overflow(dtype: torch.dtype) -> None:
    top = torch.finfo(dtype).max
    a = {"w": torch.tensor([top, -top, top, top], dtype=dtype)}
    b = {"w": torch.tensor([-top, top, top, 0.0], dtype=dtype)}
    half = float(torch.tensor(top, dtype=torch.float64) / 2)
    for found in (merge([a, b])["w"], interpolate(a, b, 0.5)["w"]):
        assert found.dtype == dtype
        assert found.double().tolist() == [0.0, 0.0, top, pytest.approx(half, rel=torch.finfo(dtype).eps)]
    for found in (merge([a, b], [3, 1])["w"], interpolate(a, b, 0.25)["w"]):
        assert found.double().tolist()[:3] == [
            pytest.approx(half, rel=torch.finfo(dtype).eps),
            pytest.approx(-half, rel=torch.finfo(dtype).eps),
            top,
        ]
    five = merge([a, b, a, b, b])["w"].double()
    assert bool(five.isfinite().all())
    assert float(five[0]) == pytest.approx(-top / 5, rel=4 * torch.finfo(dtype).eps)


def test_the_case_of_a_double() -> None:
    states = [{"w": torch.tensor([sign * 1.7e308], dtype=torch.float64)} for sign in (1, -1)]
    assert merge(states)["w"].tolist() == [0.0]
    assert merge(states[::-1])["w"].tolist() == [0.0]


def test_smallest_numbers_and_equal_ones_stay() -> None:
    tiny = {"w": torch.tensor([5e-324, -5e-324, 1e-310], dtype=torch.float64)}
    assert torch.equal(merge([tiny] * 3)["w"], tiny["w"])


@pytest.mark.parametrize(
    ("weights", "share"),
    [([1e308, 1e308], 0.5), ([1.7e308, 0.0], 0.0), ([5e-324, 5e-324], 0.5), ([1e308, 1.0], 0.0)],
)
def test_weights_of_any_size_are_divided_by_their_sum(weights: list[float], share: float) -> None:
    states = [
        {"w": torch.tensor([0.0], dtype=torch.float64)},
        {"w": torch.tensor([8.0], dtype=torch.float64)},
    ]
    assert merge(states, weights)["w"].tolist() == [pytest.approx(8 * share, abs=1e-300)]
