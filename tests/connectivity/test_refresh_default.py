"""BatchNorm: statistics of interior points are recomputed by default, and never left behind in silence."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from isthmus import line
from isthmus.connectivity import Line, interpolate
from isthmus.errors import DataError, IsthmusWarning
from isthmus.evaluation import evaluate
from isthmus.merging import merge
from isthmus.moments import refresh_batchnorm


def normed(seed: int, norm: type[nn.Module] = nn.BatchNorm1d) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(4, 8), norm(8), nn.ReLU(), nn.Linear(8, 3))
        model.train()(torch.randn(200, 4))  # running statistics that are no longer the initial ones
    return model.eval()


def examples(seed: int, count: int = 60) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return 2 * torch.randn(count, 4, generator=g) + 1, torch.randint(3, (count,), generator=g)


def measured(*given: Any, **options: Any) -> tuple[Line, list[str]]:
    """Return a line and its warnings about running statistics, which must be among its notes."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = line(*given, points=3, bootstrap=0, **options)
    told = [str(w.message) for w in caught if issubclass(w.category, IsthmusWarning)]
    assert told == list(found.notes)
    return found, [text for text in told if "running statistics" in text.lower()]


def midpoint(a: nn.Module, b: nn.Module, statistics: Any, data: Any) -> float:
    state = refresh_batchnorm(a, interpolate(a, b, 0.5), statistics)
    return evaluate(a, data, state=state).loss


def test_the_default_recomputes_on_the_training_data() -> None:
    a, b, train, test = normed(0), normed(1), examples(0), examples(1)
    found, told = measured(a, b, {"test": [test], "train": [train]})
    assert told == []
    assert found.settings["refresh"] == "batchnorm"
    assert found.midpoint_loss == pytest.approx(midpoint(a, b, [train], [test]), rel=1e-5)
    named, _ = measured(a, b, {"test": [test]}, refresh_batches=[train])
    assert named.midpoint_loss == pytest.approx(found.midpoint_loss, rel=1e-12)


def test_data_without_a_name_serve() -> None:
    a, b, data = normed(0), normed(1), examples(0)
    found, told = measured(a, b, iter([data]))
    assert told == []
    assert found.midpoint_loss == pytest.approx(midpoint(a, b, [data], [data]), rel=1e-5)


@pytest.mark.parametrize("refresh", ["auto", "batchnorm"])
@pytest.mark.parametrize("name", ["test", "Test set", "val", "cifar10-validation", "eval"])
def test_test_data_are_used_with_a_warning(name: str, refresh: str) -> None:
    a, b, data = normed(0), normed(1), examples(0)
    found, told = measured(a, b, {name: [data]}, refresh=refresh)
    assert len(told) == 1
    assert f"recomputed on {name!r}, data that the networks are also judged by" in told[0]
    assert "refresh_batches=..." in told[0]
    assert found.settings["refresh"] == "batchnorm"


def test_data_not_named_as_test_data_come_first() -> None:
    a, b = normed(0), normed(1)
    sets = {"test": [examples(0)], "held back": [examples(1)], "more": [examples(2)]}
    found, told = measured(a, b, sets)
    assert told == []
    assert found.midpoint_loss == pytest.approx(midpoint(a, b, sets["held back"], sets["test"]), rel=1e-5)


@pytest.mark.parametrize("refresh", [None, "none"])
def test_statistics_left_behind_are_told(refresh: str | None) -> None:
    a, b, data = normed(0), normed(1), examples(0)
    found, told = measured(a, b, [data], refresh=refresh)
    assert len(told) == 1
    assert "Running statistics inside the line (1) are the average of the two ends'" in told[0]
    assert found.settings["refresh"] == "none"
    assert found.midpoint_loss == pytest.approx(evaluate(a, [data], state=interpolate(a, b, 0.5)).loss)


class HomeMade(nn.Module):
    """Batch normalisation that torch does not know as such."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("running_mean", torch.randn(channels))
        self.register_buffer("running_var", torch.rand(channels) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.running_mean) / self.running_var.sqrt()


@pytest.mark.parametrize("refresh", ["auto", "batchnorm", None])
def test_layers_that_cannot_be_recomputed_are_named(refresh: str | None) -> None:
    a, b = normed(0, HomeMade), normed(1, HomeMade)
    _, told = measured(a, b, [examples(0)], refresh=refresh)
    assert len(told) == 1
    assert "inside the line (1)" in told[0]
    _, told = measured(a, b, [examples(0)], refresh=lambda state: state)
    assert told == []


def test_without_running_statistics_nothing_changes() -> None:
    def plain(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 3)).eval()

    with torch.random.fork_rng():
        a, b = plain(0), plain(1)
    reads: list[int] = []

    class Once:
        def __iter__(self) -> Any:
            reads.append(1)
            yield examples(0)

    found, told = measured(a, b, {"test": Once()}, refresh_batches=[examples(1)])
    assert (told, found.settings["refresh"], reads) == ([], "none", [1])
    off, _ = measured(a, b, {"test": [examples(0)]}, refresh=None)
    assert torch.equal(found.loss, off.loss)


def test_a_network_and_itself_need_nothing() -> None:
    a = normed(0)
    for refresh in ("auto", None):
        found, told = measured(a, a, {"test": [examples(0)]}, refresh=refresh)
        assert (told, found.barrier, found.settings["refresh"]) == ([], 0.0, "none")


def test_a_last_batch_of_one_example_is_left_out() -> None:
    a, b, (x, y) = normed(0), normed(1), examples(0, 41)
    cut = [(x[:20], y[:20]), (x[20:40], y[20:40]), (x[40:], y[40:])]
    found, _ = measured(a, b, cut)
    assert found.midpoint_loss == pytest.approx(midpoint(a, b, cut[:2], [(x, y)]), rel=1e-5)
    with pytest.raises(DataError, match="single value per channel"):
        line(a, b, cut, refresh="batchnorm")
    single = [(x[k : k + 1], y[k : k + 1]) for k in range(5)]
    with pytest.raises(DataError, match="leave the statistics as they are with refresh=None"):
        line(a, b, single)


class OwnNorm(nn.Module):
    """A norm whose buffers have names of its own."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("same", torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.get_buffer("mean").copy_(x.mean(0).detach())
        return (x - self.get_buffer("mean")) * self.get_buffer("same")


def spectral(seed: int) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = nn.Sequential(
            nn.utils.parametrizations.spectral_norm(nn.Linear(4, 8)), nn.ReLU(), nn.Linear(8, 3)
        )
    return model.eval()


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda seed: normed(seed, OwnNorm), "(1.mean)"),
        (spectral, "(0.parametrizations.weight.0._u, 0.parametrizations.weight.0._v)"),
    ],
)
def test_other_buffers_that_are_averaged_are_told(make: Any, named: str) -> None:
    a, b, data = make(0), make(1), examples(0)

    def told(of: Any) -> list[str]:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            of()
        return [str(w.message) for w in caught if "uffers" in str(w.message)]

    (text,) = told(lambda: line(a, b, [data], points=3, bootstrap=0))
    assert text.startswith(f"Buffers inside the line {named} are the average of the two ends'")
    (text,) = told(lambda: merge([a, b]))
    assert text.startswith(f"The merged buffers {named} are the average of the networks'")
    assert len(told(lambda: merge([a.state_dict(), b.state_dict()]))) == (make is spectral)
    for same in (lambda: line(a, a, [data], points=3, bootstrap=0), lambda: merge([a, a])):
        assert told(same) == []
    assert told(lambda: line(a, b, [data], points=3, bootstrap=0, refresh=lambda state: state)) == []
