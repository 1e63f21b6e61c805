"""Discovery: outputs, ties, aliases, constants, unknown operators, names, and models that cannot be traced."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from symmetry_helpers import build, check, described, group, normal, seeded
from torch import Tensor, nn

from isthmus.errors import ModelError, SymmetryError
from isthmus.symmetry import SymmetrySpec, apply, discover, trace, verify
from isthmus.testing import (
    REFERENCE_NETWORKS,
    compare_with_reference,
    randomise_state,
    reference_inputs,
    reference_network,
    reference_spec,
)

X = normal(2, 3)


# --- Reference networks ------------------------------------------------------------------------------------
def reference(name: str) -> tuple[nn.Module, tuple[Tensor, ...], SymmetrySpec]:
    model = randomise_state(reference_network(name), seeded(1))
    inputs = reference_inputs(name, generator=seeded(2))
    return model, inputs, discover(model, inputs)


@pytest.mark.parametrize("name", REFERENCE_NETWORKS)
def test_reference_networks(name: str) -> None:
    model, inputs, spec = reference(name)
    comparison = compare_with_reference(reference_spec(name), spec)
    assert comparison.equal, str(comparison)
    found = verify(spec, model, inputs, generator=seeded(3))
    assert found.passed
    assert found.max_relative_error < 1e-10


def every_slot_is_needed(name: str, step: int) -> None:
    model, inputs, spec = reference(name)
    slots = [(g.name, s) for g in spec.groups.values() for s in g.slots]
    for group_name, slot in slots[::step]:
        alone = spec.restrict([group_name]).without_slot(group_name, slot)
        found = verify(alone, model, inputs, generator=seeded(3))
        assert found.guilty == (group_name,), f"{group_name} without {slot}"


DEAR = {"densenet", "mobilenet", "resnet20", "resnet20_zero_pad", "shufflenet"}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if n in DEAR else n for n in REFERENCE_NETWORKS]
)
def test_a_removed_slot_fails_verification(name: str) -> None:
    every_slot_is_needed(name, step=7)


@pytest.mark.slow
@pytest.mark.parametrize("name", REFERENCE_NETWORKS)
def test_every_removed_slot_fails_verification(name: str) -> None:
    every_slot_is_needed(name, step=1)


def test_whole_spec_with_one_slot_removed_fails() -> None:
    model, inputs, spec = reference("resnet20")
    name, slot = next(
        (g.name, s) for g in spec.groups.values() for s in g.slots if "running_mean" in s.tensor
    )
    assert verify(spec.without_slot(name, slot), model, inputs).guilty == (name,)


# --- Outputs, inputs, meta device ---------------------------------------------------------------------------
class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Any:
        hidden = self.a(x).relu()
        return {"logits": self.b(hidden), "states": (x, hidden)}


HIDDEN = group(4, "a.weight[0]", "a.bias[0]", "b.weight[1]")


@pytest.mark.parametrize(
    ("outputs", "expected"),
    [
        (None, set()),
        ("logits", {HIDDEN}),
        (0, {HIDDEN}),
        (["logits", "states.0"], {HIDDEN}),
        ("states", {group(2, "b.weight[0]", "b.bias[0]")}),
        (-1, {group(2, "b.weight[0]", "b.bias[0]")}),
    ],
)
def test_only_chosen_outputs_are_preserved(outputs: Any, expected: Any) -> None:
    model = build(Two)
    spec = check(model, X, expected, outputs=outputs, every_slot=outputs != "states" and outputs != -1)
    if outputs == "logits":
        assert spec.outputs == ("logits",)
        assert not verify(spec, model, X, outputs="states").passed


def test_unknown_outputs_are_refused() -> None:
    with pytest.raises(
        SymmetryError, match=r"no output 'x'; the model returns \['logits', 'states.0', 'states.1'\]"
    ):
        discover(build(Two), X, outputs="x")
    with pytest.raises(SymmetryError, match="no output 7"):
        discover(build(Two), X, outputs=7)


def test_the_meta_device_needs_no_weights() -> None:
    with torch.device("meta"):
        model = reference_network("resnet20")
    found = discover(model, tuple(x.to("meta") for x in reference_inputs("resnet20")))
    assert described(found) == described(reference("resnet20")[2])


def test_half_precision_models() -> None:
    model = build(lambda: nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))).bfloat16()
    spec = discover(model, X.bfloat16())
    assert list(spec.groups) == ["0"]
    assert verify(spec, model, X.bfloat16()).passed


def test_pinned_axes_say_who_and_where() -> None:
    model = build(lambda: nn.Sequential(nn.Sequential(nn.Linear(3, 4), Cumulative()), nn.Linear(4, 2)))
    pinned = {f"{p.tensor}[{p.axis}]": p for p in discover(model, X).pinned}
    assert pinned["0.0.bias[0]"].operator == "aten.cumsum"
    assert pinned["0.0.bias[0]"].module == "0.1"
    assert pinned["0.0.weight[1]"].reason == "the model's input 'input'"
    assert pinned["1.bias[0]"].reason == "the model's output 'output'"
    assert pinned["1.bias[0]"].size == 2


class Cumulative(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.cumsum(-1)


@pytest.mark.parametrize("shape", [(2, 12), (2, 3, 4), (2, 3, 2, 2), (2, 1, 12)])
def test_pinned_positions_of_a_flattened_input_count_once(shape: tuple[int, ...]) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 5))
    sizes = {(p.tensor, p.axis): p.size for p in discover(model, torch.zeros(shape)).pinned}
    assert sizes == {("1.weight", 1): 12, ("1.weight", 0): 5, ("1.bias", 0): 5}


def test_groups_are_named_after_modules() -> None:
    _, _, spec = reference("mlp")
    assert list(spec.groups) == ["layers.0", "layers.1", "layers.2"]
    repeated = build(
        lambda: nn.Sequential(nn.Linear(3, 6), nn.Unflatten(1, (2, 3)), nn.Flatten(), nn.Linear(6, 2))
    )
    assert list(discover(repeated, X).groups) == ["0", "0#2[0]", "0#2[1]"]


def test_sizes_of_zero_one_and_two() -> None:
    for hidden in (0, 1, 2):
        with pytest.warns(UserWarning, match="zero-element") if hidden == 0 else contextlib.nullcontext():
            model = nn.Sequential(nn.Linear(3, hidden), nn.ReLU(), nn.Linear(hidden, 2)).eval()
        spec = discover(model, X)
        assert [g.size for g in spec.groups.values()] == ([2] if hidden == 2 else [])


# --- Tied and shared tensors --------------------------------------------------------------------------------
class TiedOutput(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 4)
        self.mix = nn.Linear(4, 4)
        self.head = nn.Linear(4, 5, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.embed(tokens)
        return self.head(h + self.mix(h).relu())


class SharedTwice(nn.Module):
    """One layer under two names, used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.second = self.first
        self.out = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(x + self.second(x + self.first(x).relu()).relu())


class SharedHidden(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 4))
        self.again = self.inner
        self.stem, self.out = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x)
        h = h + self.inner(h)
        return self.out(h + self.again(h))


TOKENS = torch.tensor([[0, 3, 1], [2, 2, 4]])


def test_a_name_that_is_only_another_ones_twin_is_not_called_unused() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tokens, self.norm = nn.Embedding(11, 6), nn.LayerNorm(6)
            self.head = nn.Linear(6, 11, bias=False)
            self.head.weight = self.tokens.weight

        def forward(self, numbers: torch.Tensor) -> torch.Tensor:
            return self.head(self.norm(self.tokens(numbers)))

    spec = discover(Tied().eval(), torch.arange(5)[None])
    assert {p.axis for p in spec.pinned} == {0}
    assert not any("not used" in p.reason for p in spec.pinned)
    assert {p.tensor for p in spec.pinned} == {"tokens.weight", "head.weight"}


def test_tied_parameters_move_under_all_names() -> None:
    model = build(TiedOutput)
    slots = ("embed.weight[1]", "head.weight[1]", "mix.weight[0]", "mix.weight[1]", "mix.bias[0]")
    spec = check(model, TOKENS, {group(4, *slots)})
    moved = apply(spec, {"mix": torch.tensor([1, 2, 3, 0])}, dict(model.state_dict()))
    assert torch.equal(moved["embed.weight"], moved["head.weight"])


def test_a_module_under_two_names() -> None:
    model = build(SharedHidden)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    check(
        model,
        X,
        {
            group(
                4,
                "stem.weight[0]",
                "stem.bias[0]",
                "out.weight[1]",
                *(
                    f"{m}.{t}"
                    for m in ("inner", "again")
                    for t in ("0.weight[1]", "2.weight[0]", "2.bias[0]")
                ),
            ),
            group(
                5,
                *(
                    f"{m}.{t}"
                    for m in ("inner", "again")
                    for t in ("0.weight[0]", "0.bias[0]", "2.weight[1]")
                ),
            ),
        },
    )
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert model.inner is model.again
    assert described(discover(build(SharedTwice), X)) == set()


def test_siamese_use_of_one_network() -> None:
    class Siamese(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 5))

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return F.cosine_similarity(self.body(x), self.body(y))

    expected = {
        group(4, "body.0.weight[0]", "body.0.bias[0]", "body.2.weight[1]"),
        group(5, "body.2.weight[0]", "body.2.bias[0]"),
    }
    check(build(Siamese), (X, normal(2, 3, seed=1)), expected, every_slot=False)


def test_unused_parameters_are_pinned() -> None:
    class Unused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.spare = nn.Linear(3, 2), nn.Linear(7, 7)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x)

    spec = discover(build(Unused), X)
    assert spec.groups == {}
    assert {p.reason for p in spec.pinned if p.tensor.startswith("spare")} == {
        "not used by the traced computation"
    }


# --- Constants ---------------------------------------------------------------------------------------------
class WithConstant(nn.Module):
    def __init__(self, values: Tensor, persistent: bool | None) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 2)
        if persistent is None:
            self.scale = values
        else:
            self.register_buffer("scale", values, persistent=persistent)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x) * self.scale)


@pytest.mark.parametrize("persistent", [None, False, True])
def test_constants_pin_unless_all_entries_are_equal(persistent: bool | None) -> None:
    uneven = WithConstant(torch.arange(4.0) + 1, persistent).eval()
    expected = {group(4, *(s for s in sorted(HIDDEN[1])), "scale[0]")} if persistent else set()
    check(uneven, X, expected)
    if not persistent:
        assert any("constant" in p.reason for p in discover(uneven, X).pinned)
        check(WithConstant(torch.full((4,), 2.0), persistent).eval(), X, {HIDDEN})


@pytest.mark.parametrize(
    ("made", "free"),
    [
        (lambda x: torch.ones(4), True),
        (lambda x: x.new_full((4,), 3.0), True),
        (lambda x: torch.arange(4.0), False),
        (lambda x: torch.tensor([1.0, 2.0, 3.0, 4.0]), False),
    ],
)
def test_tensors_made_inside(made: Any, free: bool) -> None:
    class Makes(Two):
        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x) + made(x))

    check(build(Makes), X, {HIDDEN} if free else set())


def test_units_that_a_constant_treats_alike_change_places_among_themselves() -> None:
    class Makes(Two):
        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x) + torch.eye(4)[1])

    spec = discover(build(Makes), X)
    places = {
        p
        for g in spec.groups.values()
        for s in g.slots
        if s.tensor == "a.bias"
        for p in s.index.positions().flatten().tolist()
    }
    assert places <= {0, 2, 3}
    assert len(places) >= 2
    verify(spec, build(Makes), X).require()


# --- Unknown operators --------------------------------------------------------------------------------------
@torch.library.custom_op("isthmus_test::reverse", mutates_args=())
def reverse(x: Tensor) -> Tensor:
    return x.flip(-1)


@reverse.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


def test_an_unknown_operator_pins_all_it_touches() -> None:
    class Unknown(Two):
        def forward(self, x: Tensor) -> Tensor:
            return self.b(reverse(self.a(x)))

    model = build(Unknown)
    spec = check(model, X, set())
    pinned = {f"{p.tensor}[{p.axis}]": p for p in spec.pinned}
    assert pinned["a.bias[0]"].reason.startswith("operator without a rule")
    assert pinned["a.bias[0]"].operator == "isthmus_test.reverse"
    assert pinned["b.weight[1]"].reason.startswith("operator without a rule")


def test_an_operator_without_a_rule_is_decomposed_alone() -> None:
    from isthmus.symmetry._operation import rule_of

    class Renamed(Two):
        def forward(self, x: Tensor) -> Tensor:
            return self.b(F.mish(self.a(x)) + F.logsigmoid(self.a(x)))

    assert rule_of("aten.log_sigmoid") is None
    check(build(Renamed), X, {HIDDEN})


# --- Models that cannot be traced ----------------------------------------------------------------------------
def test_a_model_that_cannot_be_exported() -> None:
    with pytest.raises(ModelError, match="Cannot trace Two with no example inputs"):
        discover(build(Two))
    with pytest.raises(ModelError, match=r"Cannot trace Two with inputs \(2, 5\)"):
        discover(build(Two), normal(2, 5))
    with pytest.raises(
        ModelError, match=r"Expected a torch.nn.Module to trace, found builtin_function_or_method"
    ):
        trace(torch.relu, X)  # pyright: ignore[reportArgumentType]


def test_random_models_are_refused() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.Linear(4, 2))
    with pytest.raises(ModelError, match=r"1 runs aten.dropout in training mode.*Call model.eval\(\) first"):
        discover(model, X)
    assert described(discover(model.eval(), X))

    class Noisy(Two):
        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x) + torch.randn(4))

    with pytest.raises(ModelError, match=r"Noisy calls aten.randn, which is random in evaluation mode"):
        discover(build(Noisy), X)


# --- Running a trace ----------------------------------------------------------------------------------------
def test_a_trace_computes_what_the_model_computes() -> None:
    model = build(Two)
    traced = trace(model, X)
    seen: list[str] = []
    result = traced.run(
        dict(model.state_dict()), (X,), on_node=lambda node, _value, _result: seen.append(node.name)
    )
    expected = model(X)
    assert torch.allclose(result["logits"], expected["logits"])
    assert torch.allclose(result["states"][1], expected["states"][1])
    assert seen[:2] == ["linear", "relu"]
    assert list(traced.outputs) == ["logits", "states.0", "states.1"]
    with pytest.raises(ModelError, match="The inputs have another structure than those traced"):
        traced.run(dict(model.state_dict()), (X, X))
