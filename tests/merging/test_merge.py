from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from isthmus import matching
from isthmus.connectivity import interpolate, line
from isthmus.errors import CheckpointError, DataError, ModelError, ShapeError
from isthmus.evaluation import evaluate
from isthmus.merging import merge
from isthmus.moments import refresh_batchnorm
from isthmus.states import state_of

STRANGERS = "ignore:The weights of model"  # test_merge_warnings.py is about these
AVERAGED = "ignore:The merged running statistics"
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def seeded(seed: int = 0, norm: bool = False) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        between = nn.BatchNorm1d(6) if norm else nn.Identity()
        return nn.Sequential(nn.Linear(4, 6), between, nn.ReLU(), nn.Linear(6, 3)).eval()


class Rolled:
    """An alignment that moves the six hidden units by a cycle."""

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def apply(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        moved = {
            k: v if k in ("3.bias", "1.num_batches_tracked") else v.roll(self.steps, 0)
            for k, v in state.items()
        }
        moved["3.weight"] = state["3.weight"].roll(self.steps, 1)
        return moved


def data(count: int = 20) -> Tensor:
    return torch.randn(count, 4, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_weighted_average_by_hand(dtype: torch.dtype) -> None:
    states = [{"w": torch.tensor([0.0, 8.0], dtype=dtype)}, {"w": torch.tensor([4.0, 0.0], dtype=dtype)}]
    assert merge(states)["w"].tolist() == [2.0, 4.0]
    assert merge(states, [3, 1])["w"].tolist() == [1.0, 6.0]
    assert merge(states, [0, 5])["w"].tolist() == [4.0, 0.0]
    three = merge([*states, {"w": torch.tensor([2.0, 1.0], dtype=dtype)}], [1.0, 1.0, 2.0])
    assert three["w"].tolist() == [2.0, 2.5]
    assert three["w"].dtype == dtype


@pytest.mark.filterwarnings(STRANGERS)
@pytest.mark.parametrize("t", [0.0, 0.3, 0.5, 1.0])
def test_two_networks_give_a_point_of_the_line(t: float) -> None:
    a, b = seeded(0).double(), seeded(1).double()
    merged, wanted = merge([a, b], [1 - t, t]), interpolate(a, b, t)
    for name in wanted:
        torch.testing.assert_close(merged[name], wanted[name], rtol=1e-15, atol=1e-16)


@pytest.mark.parametrize("count", [2, 3, 7])
def test_equal_networks_come_out_unchanged(count: int) -> None:
    model = seeded(0, norm=True).double()
    merged = merge([model] * count)
    assert all(torch.equal(merged[k], v) for k, v in model.state_dict().items())


def test_a_weight_of_one_gives_that_network_exactly() -> None:
    states = [{"w": torch.tensor([value], dtype=torch.float64)} for value in (1e16, 1.0, -3.0)]
    assert merge(states, [0, 1, 0])["w"].item() == 1.0


def test_low_precision_is_summed_in_float64() -> None:
    states = [{"w": torch.tensor([w], dtype=torch.bfloat16)} for w in (1024.0, 1.0, 1.0, 1.0, 1.0)]
    exact = torch.tensor([1028 / 5], dtype=torch.float64).bfloat16()
    assert torch.equal(merge(states)["w"], exact)


def test_integer_buffers_are_the_first_ones_and_nothing_is_shared_or_changed() -> None:
    a, b = seeded(0, norm=True), seeded(1, norm=True)
    a[1].num_batches_tracked.fill_(7)  # type: ignore[union-attr,operator]
    before = [t.clone() for t in (*a.state_dict().values(), *b.state_dict().values())]
    merged = merge([a, b], [0.0, 1.0])
    assert int(merged["1.num_batches_tracked"]) == 7
    for tensor in merged.values():
        tensor.zero_()
    after = [*a.state_dict().values(), *b.state_dict().values()]
    assert all(torch.equal(x, y) for x, y in zip(before, after, strict=True))


@pytest.mark.filterwarnings(STRANGERS)
def test_the_result_loads() -> None:
    a, b = seeded(0), seeded(1)
    target = seeded(2)
    target.load_state_dict(merge([a, b]))
    x = data()
    assert torch.equal(target(x), torch.func.functional_call(a, interpolate(a, b, 0.5), (x,)))


def test_tied_tensors_stay_tied() -> None:
    def tied(value: float) -> nn.Module:
        model = nn.ModuleDict({"x": nn.Linear(2, 2, bias=False), "y": nn.Linear(2, 2, bias=False)})
        model["x"].weight = model["y"].weight
        nn.init.constant_(model["x"].weight, value)  # type: ignore[arg-type]
        return model

    class Copying:
        def apply(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
            return {k: v.clone() for k, v in state.items()}

    for alignments in (None, [Copying()]):
        merged = merge([tied(1.0), tied(3.0)], alignments=alignments)
        assert merged["x.weight"] is merged["y.weight"]
        assert merged["x.weight"][0, 0] == 2.0


@pytest.mark.filterwarnings(STRANGERS)
@pytest.mark.filterwarnings(AVERAGED)
def test_alignments_relabel_all_but_the_first() -> None:
    a = seeded(0, norm=True)
    others = [Rolled(2).apply(a.state_dict()), Rolled(-1).apply(a.state_dict()), a.state_dict()]
    merged = merge([a, *others], alignments=[Rolled(-2), Rolled(1), None])
    for name, tensor in a.state_dict().items():
        assert torch.equal(merged[name], tensor)
    assert not torch.equal(merge([a, *others])["0.weight"], a[0].weight)


@pytest.mark.parametrize("as_states", [False, True])
def test_align_calls_the_matcher(as_states: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[dict[str, Any]] = []

    def fake(model_a: nn.Module, model_b: nn.Module, **settings: Any) -> Rolled:
        calls.append({"a": model_a, "b": model_b, **settings})
        return Rolled(-2 if len(calls) == 1 else 1)

    monkeypatch.setattr(matching, "align", fake, raising=False)
    a, b, c = seeded(0), seeded(1), seeded(2)
    b.load_state_dict(Rolled(2).apply(a.state_dict()))
    c.load_state_dict(Rolled(-1).apply(a.state_dict()))
    models: list[Any] = [m.state_dict() for m in (a, b, c)] if as_states else [a, b, c]
    merged = merge(models, align="weights", batches=iter([data()]), model=seeded(3) if as_states else None)
    assert all(torch.equal(merged[k], v) for k, v in a.state_dict().items())
    assert [call["method"] for call in calls] == ["weights", "weights"]
    assert [len(list(call["batches"])) for call in calls] == [1, 1]  # a one-shot iterator serves both
    assert all(torch.equal(call["a"][0].weight, a[0].weight) for call in calls)
    assert [call["b"] for call in calls] == models[1:]
    assert (calls[0]["a"] is a) != as_states


@pytest.mark.parametrize("method", ["weights", "activations"])
def test_aligned_merge_of_permuted_copies_is_the_network(method: str) -> None:
    a = seeded(0, norm=True).double()
    copies = [Rolled(2).apply(a.state_dict()), Rolled(-1).apply(a.state_dict())]
    merged = merge([a, *copies], align=method, batches=[data().double()])
    assert all(torch.equal(merged[k], v) for k, v in a.state_dict().items())


def test_aligning_by_keyword_inputs_needs_no_data() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 5), nn.Linear(5, 2)

        def forward(self, *, inputs: Tensor) -> Tensor:
            return self.b(self.a(inputs).relu())

    torch.manual_seed(0)
    model, ring = Named().double(), torch.tensor([1, 2, 3, 4, 0])
    state = {k: v.clone() for k, v in model.state_dict().items()}
    moved = {
        "a.weight": state["a.weight"][ring],
        "a.bias": state["a.bias"][ring],
        "b.weight": state["b.weight"][:, ring],
    }
    merged = merge(
        [model, {**state, **moved}], align="weights", kwargs={"inputs": torch.zeros(2, 3).double()}
    )
    assert all(torch.equal(merged[k], v) for k, v in state.items())


@pytest.mark.filterwarnings(STRANGERS)
@pytest.mark.filterwarnings(AVERAGED)
def test_refresh() -> None:
    a, b = seeded(0, norm=True), seeded(1, norm=True)
    wanted = refresh_batchnorm(a, interpolate(a, b, 0.5), [data()])
    for models, model in (([a, b], None), ([state_of(a), state_of(b)], a), ([state_of(a), b], None)):
        found = merge(models, refresh="batchnorm", batches=[data()], model=model)
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-7)
    halved = merge([a, b], refresh=lambda state: {k: v / 2 for k, v in state.items()})
    torch.testing.assert_close(halved["0.weight"], wanted["0.weight"] / 2)


@pytest.mark.filterwarnings(STRANGERS)
def test_merged_networks_meet_the_line() -> None:
    a, b = seeded(0), seeded(1)
    batch = (data(), torch.arange(20) % 3)
    merged = evaluate(a, [batch], state=merge([a, b], alignments=[Rolled(1)]))
    measured = line(a, b, [batch], alignment=Rolled(1))
    assert merged.loss == pytest.approx(measured.midpoint_loss, rel=1e-6)


PAIR = [{"w": torch.zeros(2)}, {"w": torch.ones(2)}]


@pytest.mark.parametrize(
    ("models", "settings", "error", "text"),
    [
        ([], {}, DataError, "needs two networks or more, found 0"),
        (PAIR[:1], {}, DataError, "found 1"),
        (PAIR, {"weights": [1.0]}, ShapeError, "expected 2 weights, found 1"),
        (PAIR, {"weights": [1.0, -0.5]}, DataError, "must be finite, not negative and not all zero"),
        (PAIR, {"weights": [0.0, 0.0]}, DataError, "not all zero; found"),
        (PAIR, {"weights": [1.0, math.nan]}, DataError, "must be finite"),
        (PAIR, {"weights": [math.inf, 1.0]}, DataError, "must be finite"),
        (
            [PAIR[0], {"v": torch.ones(2)}],
            {},
            CheckpointError,
            "model 1 are different architectures",
        ),
        ([PAIR[0], {"w": torch.ones(3)}], {}, ShapeError, "'w': model 0 has shape"),
        ([*PAIR, {"w": torch.tensor([0.0, math.nan])}], {}, CheckpointError, "model 2: 'w' has 1 NaN"),
        ([PAIR[0], {"w": 1.0}], {}, CheckpointError, "model 1: expected a tensor under 'w'"),
        (PAIR, {"alignments": []}, ShapeError, "expected 1 alignments, .*, found 0"),
        (PAIR, {"alignments": [None], "align": "weights"}, DataError, "not both"),
        (PAIR, {"align": "weights"}, ModelError, "align='weights' runs the network: pass its architecture"),
        (PAIR, {"refresh": "batchnorm", "batches": [data()]}, ModelError, "pass its architecture as model="),
        (PAIR, {"refresh": "batchnorm"}, DataError, "needs batches"),
        (PAIR, {"refresh": "repair"}, DataError, "Unknown refresh 'repair'"),
        (PAIR, {"refresh": lambda state: {}}, CheckpointError, "the refreshed state lacks 'w'"),
    ],
)
def test_bad_input(models: Any, settings: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        merge(models, **settings)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_eight_bit_floats_are_averaged_in_wider_numbers(dtype: torch.dtype) -> None:
    """0.25 and 448 in e4m3 (57,344 in e5m2) have sums that eight bits do not hold."""
    largest = torch.finfo(dtype).max
    tied = torch.tensor([largest, 0.25, -1.0]).to(dtype)
    states = [{"w": tied, "v": tied}, {"w": torch.tensor([largest, 0.75, 3.0]).to(dtype)}]
    states[1]["v"] = states[1]["w"]
    merged = merge(states)
    assert merged["w"].dtype == dtype
    assert merged["w"].double().tolist() == [largest, 0.5, 1.0]
    assert merged["v"].data_ptr() == merged["w"].data_ptr()
    with pytest.raises(CheckpointError, match="'w' has 1 NaN"):
        merge([{"w": torch.tensor([float("nan"), 1.0]).to(dtype)}] * 2)


@pytest.mark.filterwarnings(STRANGERS)
@pytest.mark.filterwarnings(AVERAGED)
def test_the_versions_of_modules_stay_with_a_merged_state() -> None:
    """Without them torch takes the state for one of an old version, and some modules read that differently."""
    a, b = seeded(0, norm=True), seeded(1, norm=True)
    merged = merge([a, b])
    assert merged._metadata == a.state_dict()._metadata  # type: ignore[attr-defined]
    assert merge([a.state_dict(), b.state_dict()])._metadata["1"] == {"version": 2}  # type: ignore[attr-defined]
    aligned = matching.align(a, b, args=(data(),), method="weights")
    assert aligned.apply(state_of(b))._metadata == b.state_dict()._metadata  # type: ignore[attr-defined]
    assert aligned.apply(b).state_dict()._metadata == b.state_dict()._metadata
    assert merge([a, b], alignments=[aligned])._metadata["1"] == {"version": 2}  # type: ignore[attr-defined]


class Second(nn.Module):
    """Refuses a state of another version, as MNASNet does."""

    _version = 2

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2)

    def _load_from_state_dict(self, state: Any, prefix: str, local: Any, *rest: Any) -> None:
        if local.get("version") != 2:
            raise ValueError("unknown version")
        super()._load_from_state_dict(state, prefix, local, *rest)


@pytest.mark.filterwarnings(STRANGERS)
@pytest.mark.filterwarnings(AVERAGED)
def test_a_module_that_asks_for_its_version_loads_what_was_merged() -> None:
    Second().load_state_dict(merge([Second(), Second()]))
