"""Paths as values: the straight one, recomputed ones, and a user's own, measured along and merged on."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import isthmus
from isthmus import Path, Refreshed, Straight, line, line_along, merge
from isthmus.errors import CheckpointError, DataError, IsthmusWarning, ModelError, ShapeError
from isthmus.evaluation import evaluate
from isthmus.moments import refresh_batchnorm
from isthmus.paths import mixed, recompute_of, require_path
from isthmus.states import State, state_of
from isthmus.testing import randomise_state, reference_network

STRANGERS = "ignore:The weights of model"


def network(seed: int, norm: bool = False, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        between = [nn.BatchNorm1d(6)] if norm else []
        model = nn.Sequential(nn.Linear(70, 6), *between, nn.ReLU(), nn.Linear(6, 3))
    return randomise_state(model, torch.Generator().manual_seed(seed)).to(dtype).eval()


def examples(count: int = 40, seed: int = 0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(count, 70, generator=g), torch.randint(3, (count,), generator=g)


class Bezier:
    """A quadratic Bezier curve, as a user writes one; all tensors bend but those named straight."""

    def __init__(
        self, a: State, bend: State, b: State, straight: tuple[str, ...] = (), skew: float = 0.0
    ) -> None:
        self.ends, self.bend, self.straight, self.skew = (a, b), bend, straight, skew

    def at(self, t: float) -> State:
        a, b = self.ends
        t = t + self.skew * math.sin(2 * math.pi * t)
        return {
            k: torch.lerp(a[k], b[k], t)
            if k in self.straight
            else (1 - t) ** 2 * a[k] + 2 * t * (1 - t) * self.bend[k] + t**2 * b[k]
            if a[k].is_floating_point()
            else a[k]
            for k in a
        }


def bent(norm: bool = False, straight: tuple[str, ...] = (), dtype: torch.dtype = torch.float32) -> Bezier:
    a, bend, b = (state_of(network(seed, norm, dtype)) for seed in range(3))
    return Bezier(a, bend, b, straight)


# --- Straight ---------------------------------------------------------------------------------------------------


def test_the_straight_path_gives_the_mix_and_leaves_its_ends_alone() -> None:
    a, b = network(0, norm=True), network(1, norm=True)
    path = Straight(a, b)
    assert isinstance(path, Path)
    assert set(path.straight) == set(a.state_dict())
    for t in (0.0, 0.25, 1.0):
        found, wanted = path.at(t), isthmus.interpolate(a, b, t)
        assert all(torch.equal(found[k], wanted[k]) for k in wanted)
        for tensor in found.values():
            tensor.zero_()
    assert torch.equal(path.ends[0]["0.weight"], a[0].weight)
    assert torch.equal(path.ends[1]["0.weight"], b[0].weight)
    assert path.at(2.0)["0.weight"].allclose(2 * b[0].weight - a[0].weight)


def test_what_cannot_be_joined_is_refused_by_the_names_given() -> None:
    with pytest.raises(CheckpointError, match="old and new are different architectures"):
        Straight({"w": torch.ones(1)}, {"v": torch.ones(1)}, names=("old", "new"))
    with pytest.raises(ShapeError, match="'w': A has shape"):
        Straight({"w": torch.ones(1)}, {"w": torch.ones(2)})
    with pytest.raises(CheckpointError, match="B: 'w' has 1 NaN"):
        Straight({"w": torch.ones(1)}, {"w": torch.tensor([math.nan])})
    with pytest.raises(DataError, match="expected a finite t"):
        Straight({"w": torch.ones(1)}, {"w": torch.ones(1)}).at(math.nan)


# --- Refreshed --------------------------------------------------------------------------------------------------


def two() -> Straight:
    return Straight({"w": torch.zeros(1)}, {"w": torch.ones(1)})


def told_both(state: State, t: float, ends: tuple[State, State]) -> State:
    return {"w": state["w"] + 10 * t + 100 * ends[1]["w"]}


def told_by_keyword(state: State, *, t: float = 9.0) -> State:
    return {"w": state["w"] + 10 * t}


def with_a_default(state: State, t: float = 9.0) -> State:
    return {"w": state["w"] + 10 * t}


def first_named_t(t: State) -> State:
    return {"w": t["w"] + 1}


class Object:
    def __call__(self, state: State, ends: Any) -> State:
        return {"w": ends[0]["w"] - 3}


@pytest.mark.parametrize(
    ("function", "value"),
    [
        (told_both, 0.25 + 2.5 + 100),
        (told_by_keyword, 0.25 + 2.5),
        (with_a_default, 0.25 + 90),
        (first_named_t, 1.25),
        (lambda state: {"w": 2 * state["w"]}, 0.5),
        (Object(), -3.0),
        (dict, 0.25),
    ],
    ids=["both", "keyword", "default", "first", "plain", "object", "built in"],
)
def test_a_function_is_told_what_it_asks_for(function: Any, value: float) -> None:
    path = Refreshed(two(), function)
    assert path.at(0.25)["w"].tolist() == [value]
    assert path.at(0.0)["w"].tolist() == [0.0]
    assert path.at(1)["w"].tolist() == [1.0]
    assert path.straight == ()
    assert path.ends is path.path.ends


def test_what_a_function_returns_is_checked() -> None:
    for function, error, text in (
        (lambda state: {}, CheckpointError, "the refreshed state lacks 'w'"),
        (lambda state: {"w": torch.ones(3)}, ShapeError, "the refreshed state has"),
        (lambda state: {"w": state["w"] / 0}, CheckpointError, "'w' has 1 NaN"),
    ):
        with pytest.raises(error, match=text):
            Refreshed(two(), function).at(0.5)


def test_running_statistics_are_recomputed_inside_only() -> None:
    a, b, data = network(0, norm=True), network(1, norm=True), examples()
    path = Refreshed.batchnorm(Straight(a, b), a, iter([data]))
    for t in (0.3, 0.6):  # an iterator serves every point
        wanted = refresh_batchnorm(a, isthmus.interpolate(a, b, t), [data])
        assert all(torch.equal(v, wanted[k]) for k, v in path.at(t).items())
    assert torch.equal(path.at(1.0)["1.running_mean"], b[1].running_mean)  # type: ignore[arg-type]
    assert set(a.state_dict()) - set(path.straight) == {
        "1.running_mean",
        "1.running_var",
        "1.num_batches_tracked",
    }
    assert Refreshed(path, lambda state: state).straight == ()


@pytest.mark.filterwarnings(STRANGERS)
def test_the_line_and_merge_tell_a_function_too() -> None:
    a, b, data = network(0), network(1), examples()
    seen: list[float] = []

    def shrunk(state: State, t: float, ends: tuple[State, State]) -> State:
        seen.append(t)
        assert torch.equal(ends[1]["0.weight"], b[0].weight)
        return {k: v * t for k, v in state.items()}

    found = line(a, b, [data], points=3, refresh=shrunk)
    wanted = {k: v / 2 for k, v in isthmus.interpolate(a, b, 0.5).items()}
    assert found.midpoint_loss == pytest.approx(evaluate(a, [data], state=wanted).loss, rel=1e-5)
    assert set(seen) == {0.5}
    assert found.settings["refresh"] == "shrunk"
    found = merge([a, b], [1, 3], refresh=lambda state, t: {k: v * t for k, v in state.items()})
    assert torch.equal(found["0.weight"], isthmus.interpolate(a, b, 0.75)["0.weight"] * 0.75)
    with pytest.raises(DataError, match="asks for t and ends, which the average of more than two networks"):
        merge([a, b, b], refresh=shrunk)
    recompute = recompute_of(shrunk, None, None)
    assert recompute is not None
    assert recompute.told == ("t", "ends")


# --- Merging ----------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings(STRANGERS)
@pytest.mark.parametrize("weights", [None, [3.0, 1.0], [0.2, 0.6], [0.0, 1.0], [1.0, 0.0]])
def test_merging_two_is_a_point_of_the_path(weights: list[float] | None) -> None:
    a, b, data = network(0, norm=True), network(1, norm=True), examples()
    t = 0.5 if weights is None else weights[1] / sum(weights)
    path = Refreshed.batchnorm(Straight(a, b), a, [data])
    found, wanted = merge([a, b], weights, batches=[data]), path.at(t)
    assert all(torch.equal(found[k], wanted[k]) for k in wanted)


# --- Lines ------------------------------------------------------------------------------------------------------


def equal_lines(one: isthmus.Line, other: isthmus.Line) -> bool:
    return all(
        torch.equal(getattr(one.curve, n), getattr(other.curve, n)) for n in ("ts", "loss", "lmc_error")
    )


@pytest.mark.parametrize("points", [5, "adaptive"])
def test_the_line_is_that_along_the_straight_path_to_the_aligned_network(points: Any) -> None:
    a, b, data = network(0), network(1), [examples()]
    aligned = isthmus.align(a, b, batches=data, method="weights")
    wanted = line(a, b, data, points=points, tolerance=0.05, alignment=aligned)
    found = line_along(Straight(a, aligned.apply(state_of(b))), a, data, points=points, tolerance=0.05)
    assert found.settings["evaluation"] == wanted.settings["evaluation"] == "traced"
    assert found.settings["path"] == "Straight"
    assert torch.equal(found.loss[:-1], wanted.loss[:-1])
    assert torch.equal(
        found.ts, wanted.ts
    )  # b itself is run at the end of the line, its relabelled state on the path
    torch.testing.assert_close(found.loss, wanted.loss, rtol=1e-6, atol=1e-7)


def test_the_line_refreshes_as_a_refreshed_path_does() -> None:
    g = torch.Generator().manual_seed(2)
    a, b = (randomise_state(reference_network("resnet20", width=1 / 4), g).eval() for _ in range(2))
    data = [(torch.randn(20, 3, 8, 8, generator=g), torch.randint(10, (20,), generator=g))]
    found = line_along(Refreshed.batchnorm(Straight(a, b), a, data), a, data, points=4)
    assert equal_lines(found, line(a, state_of(b), data, points=4))
    assert found.settings["path"] == "Refreshed(Straight)"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("straight", [(), ("0.weight", "0.bias")], ids=["bent", "first layer straight"])
def test_a_path_of_ones_own_is_measured(straight: tuple[str, ...], dtype: torch.dtype) -> None:
    path, data = bent(straight=straight, dtype=dtype), examples()
    model = network(7, dtype=dtype)  # its own weights do not matter
    found = line_along(path, model, [data], points=5)
    assert found.settings["evaluation"] == "traced"
    assert found.settings["path"] == "Bezier"
    for t, loss in zip(found.ts.tolist(), found.loss.tolist(), strict=True):
        assert loss == pytest.approx(evaluate(model, [data], state=path.at(t)).loss, rel=1e-5)
    outputs = [torch.func.functional_call(model, path.at(t), (data[0].to(dtype),)) for t in (0, 0.5, 1)]
    error = (outputs[1] - (outputs[0] + outputs[2]) / 2).norm(dim=1).mean()
    assert float(found.lmc_error[2]) == pytest.approx(float(error), rel=1e-4)
    chord = line(network(0, dtype=dtype), network(2, dtype=dtype), [data], points=5)
    assert chord.curve.endpoint_losses == pytest.approx(found.curve.endpoint_losses, rel=1e-5)
    assert abs(chord.midpoint_loss - found.midpoint_loss) > 1e-3


def test_states_in_another_dtype_are_brought_to_the_ends() -> None:
    class Wide(Bezier):
        def at(self, t: float) -> State:
            return {k: v.double() for k, v in super().at(t).items()}

    narrow = bent()
    wide = Wide(narrow.ends[0], narrow.bend, narrow.ends[1])
    found, wanted = (line_along(p, network(0), [examples()], points=3) for p in (wide, narrow))
    assert equal_lines(found, wanted)


def test_running_statistics_of_ones_own_path_are_spoken_of() -> None:
    path, model, data = bent(norm=True), network(0, norm=True), examples()
    with pytest.warns(IsthmusWarning, match=r"inside the path \(1\) are those that Bezier gives"):
        found = line_along(path, model, [data], points=3)
    assert "isthmus.Refreshed" in found.notes[0]
    refreshed = line_along(Refreshed.batchnorm(path, model, [data]), model, [data], points=3)
    assert [n for n in refreshed.notes if "unning statistics" in n] == []
    wanted = evaluate(model, [data], state=refresh_batchnorm(model, path.at(0.5), [data])).loss
    assert refreshed.midpoint_loss == pytest.approx(wanted, rel=1e-5)
    with pytest.warns(IsthmusWarning, match=r"inside the line \(1\) are the average of the two ends'"):
        line_along(Straight(model, network(1, norm=True)), model, [data], points=3)


def test_warnings_point_at_the_callers_line() -> None:
    with pytest.warns(IsthmusWarning) as caught:
        line_along(bent(norm=True), network(0, norm=True), [examples()], points=3)
    assert {w.filename for w in caught} == {__file__}


class Broken(Bezier):
    """A path that is wrong at one place."""

    def __init__(self, change: Mapping[str, Tensor] | None, where: float, lacks: str = "") -> None:
        found = bent()
        super().__init__(found.ends[0], found.bend, found.ends[1])
        self.change, self.where, self.lacks = change, where, lacks

    def at(self, t: float) -> State:
        found = super().at(t)
        return (
            {k: v for k, v in {**found, **(self.change or {})}.items() if k != self.lacks}
            if t == self.where
            else found
        )


class Lacking:
    ends = ({}, {})


@pytest.mark.parametrize(
    ("path", "error", "text"),
    [
        (Lacking(), ModelError, "Expected a path, found Lacking, which lacks straight, at"),
        (Broken({"0.bias": torch.ones(6)}, 0.0), ModelError, r"at t = 0: '0.bias' differs by .* ends\[0\]"),
        (Broken({"0.bias": torch.ones(6)}, 1.0), ModelError, r"at t = 1: '0.bias' differs by .* ends\[1\]"),
        (bent(straight=("nothing",)), ModelError, "names 'nothing' among its straight tensors"),
        (Broken(None, 0.5, "0.bias"), CheckpointError, "the path at t = 0.5 lacks '0.bias'"),
        (Broken({"0.bias": torch.ones(2)}, 0.5), ShapeError, r"the path at t = 0.5 has \(2,\)"),
        (Broken({"0.bias": torch.full((6,), math.nan)}, 0.5), CheckpointError, "at t = 0.5: '0.bias' has 6 NaN"),
    ],
)  # fmt: skip
def test_what_is_no_path_is_refused(path: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        line_along(path, network(0), [examples()], points=3)


def test_only_paths_and_functions_are_wrapped() -> None:
    with pytest.raises(
        ModelError, match=r"found Sequential, which lacks ends, straight, at\. .*isthmus\.Straight"
    ):
        Refreshed(network(0), lambda state: state)  # type: ignore[arg-type]
    with pytest.raises(ModelError, match="found dict, which lacks"):
        isthmus.Repaired({}, network(0), [examples()])  # type: ignore[arg-type]
    with pytest.raises(DataError, match=r"found 'batchnorm'\. Refreshed\.batchnorm\(path, model, batches\)"):
        Refreshed(two(), "batchnorm")  # type: ignore[arg-type]


def test_three_ends_are_no_path() -> None:
    path = bent()
    path.ends = (*path.ends, path.bend)  # type: ignore[assignment]
    with pytest.raises(ModelError, match="two ends, found 3"):
        require_path(path)


def test_a_path_that_passes_the_middle_in_time_but_runs_unevenly_is_not_straight() -> None:
    found = bent()
    names = tuple(found.ends[0])
    uneven = Bezier(found.ends[0], found.bend, found.ends[1], straight=names, skew=0.1)
    between = mixed(*found.ends, 0.5, names)
    assert all(torch.allclose(v, between[k], atol=1e-6) for k, v in uneven.at(0.5).items())
    with pytest.raises(ModelError, match="the mix of the ends' where straight names it"):
        line_along(uneven, network(0), [examples()], points=3)
    with pytest.raises(ModelError, match="the mix of the ends' where straight names it"):
        line_along(Refreshed(uneven, lambda state: state), network(0), [examples()], points=3)


def test_the_model_must_be_one_in_evaluation() -> None:
    with pytest.raises(ModelError, match=r"expected model to be a torch\.nn\.Module"):
        line_along(bent(), {}, [examples()])  # type: ignore[arg-type]
    with pytest.raises(ModelError, match="in training mode"):
        line_along(bent(norm=True), network(0, norm=True).train(), [examples()])


def test_along_a_path_nothing_is_changed() -> None:
    path, model, data = bent(norm=True), network(3, norm=True), examples()
    tensors = [*model.state_dict().values(), *(t for s in (*path.ends, path.bend) for t in s.values()), *data]
    before = [t.clone() for t in tensors]
    line_along(Refreshed.batchnorm(path, model, [data]), model, [data], points=3)
    assert all(torch.equal(x, y) for x, y in zip(tensors, before, strict=True))
