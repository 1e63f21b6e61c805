"""Verification must catch what discovery gets wrong: planted faults, random models, float32-only models."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from symmetry_helpers import build, normal, seeded
from torch import Tensor, nn

from isthmus.errors import ModelError, SymmetryError, VerificationError
from isthmus.symmetry import AxisGroup, IndexMap, Slot, SymmetrySpec, discover, function_change, verify
from isthmus.testing import reference_inputs, reference_network

X = normal(2, 3)


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2))


def flattened() -> nn.Module:
    return nn.Sequential(nn.Conv2d(2, 4, 1), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2))


def fresh_norm() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).eval()


def edited(spec: SymmetrySpec, name: str, *slots: Slot) -> SymmetrySpec:
    return spec.with_group(AxisGroup(name, spec.groups[name].size, slots))


def test_a_right_spec_passes_and_says_what_was_measured() -> None:
    model = build(mlp)
    found = verify(discover(model, X), model, X, generator=seeded(7))
    assert found.passed
    assert found.require() is found
    assert (found.draws, found.guilty, found.dtype, found.seed) == (2, (), torch.float64, 7)
    assert set(found.errors) == {"output"}
    assert str(found).startswith("function preserved: largest relative error")
    assert "over 2 random relabellings and 2 larger elements in float64 (tolerance 1e-10)" in str(found)
    assert verify(discover(model, X), model, X, draws=5).draws == 5


def test_an_extra_slot_is_caught_and_named() -> None:
    model = build(mlp)
    spec = discover(model, X)
    extra = Slot("4.bias", 0, IndexMap(2, 2))
    wrong = spec.with_group(AxisGroup("extra", 2, (extra,)))
    found = verify(wrong, model, X)
    assert found.guilty == ("extra",)
    assert "CHANGED by extra" in str(found)
    with pytest.raises(
        VerificationError, match=r"relative error .*, at most 1e-10 allowed. Guilty: extra. Correct"
    ):
        found.require()


def test_two_groups_tied_by_mistake_still_pass_but_a_wrong_tie_does_not() -> None:
    model = build(mlp)
    spec = discover(model, X)
    slots = spec.groups["0"].slots
    spec = spec.restrict([name for name in spec.groups if name != "0"])
    shifted = tuple(Slot(s.tensor, s.axis, IndexMap(6, 5, 1)) for s in slots)
    assert verify(spec.with_group(AxisGroup("part", 5, shifted)), model, X).passed
    torn = (shifted[0], Slot("0.bias", 0, IndexMap(6, 5)), shifted[2])
    assert verify(spec.with_group(AxisGroup("part", 5, torn)), model, X).guilty == ("part",)


@pytest.mark.parametrize("index", range(3))
def test_a_missing_slot_is_caught_and_named(index: int) -> None:
    model = build(mlp)
    spec = discover(model, X)
    wrong = spec.without_slot("2", spec.groups["2"].slots[index])
    assert verify(wrong, model, X).guilty == ("2",)


def test_a_wrong_factor_order_is_caught() -> None:
    model, image = build(flattened), normal(2, 2, 2, 2)
    spec = discover(model, image)
    right = spec.groups["0"].slots
    assert [s.index for s in right if s.tensor == "3.weight"] == [IndexMap(16, 4, 0, 4, ((4, 1),))]
    turned = tuple(
        Slot(s.tensor, s.axis, IndexMap(16, 4, 0, 1, ((4, 4),))) if s.tensor == "3.weight" else s
        for s in right
    )
    assert verify(edited(spec, "0", *turned), model, image).guilty == ("0",)


@pytest.mark.parametrize("tensor", ["1.weight", "1.bias", "1.running_mean", "1.running_var"])
def test_fresh_norms_hide_nothing(tensor: str) -> None:
    model = fresh_norm()
    spec = discover(model, X)
    assert verify(spec, model, X).passed
    slot = next(s for s in spec.groups["0"].slots if s.tensor == tensor)
    assert verify(spec.without_slot("0", slot), model, X).guilty == ("0",)


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_constant_inputs_hide_nothing(value: float) -> None:
    model = build(mlp)
    spec = discover(model, X)
    extra = spec.with_group(AxisGroup("inputs", 3, (Slot("0.weight", 1, IndexMap(3, 3)),)))
    assert verify(extra, model, torch.full((2, 3), value)).guilty == ("inputs",)


def test_torn_ties_are_caught() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(4, 4)
            self.again = self.inner
            self.stem, self.out = nn.Linear(3, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.again(self.inner(self.stem(x)).relu()))

    model = build(Tied)
    spec = discover(model, X)
    assert verify(spec, model, X).passed
    (name,) = spec.groups
    slot = next(s for s in spec.groups[name].slots if s.tensor == "again.weight")
    found = verify(spec.without_slot(name, slot), model, X)
    assert found.max_relative_error == float("inf")


def test_groups_that_fail_only_together() -> None:
    class Product(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.tensor([[1.0, 2.0], [2.0, 4.0]]))

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.w

    model = Product().eval()
    rows = AxisGroup("rows", 2, (Slot("w", 0, IndexMap(2, 2)),))
    spec = SymmetrySpec({"rows": rows}, (), {"w": (2, 2)})
    zero = verify(spec, model, normal(1, 2), tolerance=1e9)
    assert zero.passed
    with pytest.raises(VerificationError, match="no single group, only several together"):
        type(zero)(1.0, 1e-10, 2, (), {}, torch.float64, 0).require()


def test_the_model_and_the_inputs_stay_untouched() -> None:
    model = build(fresh_norm)
    inputs = torch.zeros(2, 3)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    verify(discover(model, inputs), model, inputs)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert not inputs.any()
    assert next(model.parameters()).dtype == torch.float32


def test_models_that_cast_to_float32_are_computed_in_float64() -> None:
    class Casts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            h = self.a(x).float()
            h = F.softmax(h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True)), -1, dtype=torch.float32)
            return self.b(h.to(x.dtype) + torch.ones(4, dtype=torch.float32))

    model = build(Casts)
    found = verify(discover(model, X), model, X)
    assert found.dtype == torch.float64
    assert found.max_relative_error < 1e-12


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bool])
def test_fractions_of_whole_numbers_are_computed_in_float64(dtype: torch.dtype) -> None:
    """As image codes have them; torch makes them float32, which a convolution of float64 weights refuses."""

    class Coded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.b((255 * self.a(x).sigmoid()).round().to(dtype) / 255)

    model, images = build(Coded), normal(2, 3, 4, 4)
    spec = discover(model, images)
    found = verify(spec, model, images)
    assert len(spec.groups) == 1
    assert found.dtype == torch.float64
    assert found.max_relative_error < 1e-12


@torch.library.custom_op("isthmus_test::single", mutates_args=())
def single(x: Tensor) -> Tensor:
    if x.dtype != torch.float32:
        raise RuntimeError(f"expected scalar type Float, found {x.dtype}")
    return x.clone()


@single.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


class OnlySingle(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(3, 6), nn.Linear(6, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(single(self.b(self.a(x).relu())))


def test_models_that_only_run_in_float32() -> None:
    model = build(OnlySingle)
    spec = discover(model, X)
    found = verify(spec, model, X)
    assert found.passed
    assert found.dtype == torch.float32
    assert found.tolerance == 1e-3
    wrong = spec.without_slot("a", spec.groups["a"].slots[1])
    assert verify(wrong, model, X).guilty == ("a",)


class Noisy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) + torch.randn(2)


class Broken(Noisy):
    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) / 0 * 0


EMPTY = SymmetrySpec({}, (), {})


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (Noisy().eval(), "Two identical runs of Noisy return different 'output': the model is random"),
        (nn.Sequential(nn.Linear(3, 4), nn.Dropout()), r"in training mode: 1 \(Dropout\)"),
        (nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)), r"in training mode: 1 \(BatchNorm1d\)"),
        (nn.Linear(7, 4).eval(), "Running Linear on the example inputs failed"),
        (Broken().eval(), "Broken returns no finite value in 'output'"),
        (nn.Linear(3, 2, device="meta").eval(), "'weight' is on the meta device and has no values"),
    ],
    ids=["random", "dropout", "batch norm", "wrong input", "nan", "meta"],
)
def test_models_that_cannot_be_verified(model: nn.Module, said: str) -> None:
    with pytest.raises(ModelError, match=said):
        verify(EMPTY, model, X)


def test_the_change_made_by_given_permutations() -> None:
    model = build(mlp)
    spec = discover(model, X)
    cycle = {"0": torch.tensor([1, 2, 0, 4, 5, 3])}
    assert function_change(spec, cycle, model, X) < 1e-12
    assert function_change(spec.without_slot("0", spec.groups["0"].slots[0]), cycle, model, X) > 1e-3
    assert function_change(spec, {}, model, X) == 0


def test_outputs_of_integers_are_compared_by_equality() -> None:
    class Label(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(3, 5)

        def forward(self, x: Tensor) -> Any:
            return {"label": self.a(x).argmax(-1)}

    model = build(Label)
    wrong = SymmetrySpec(
        {"g": AxisGroup("g", 5, (Slot("a.weight", 0, IndexMap(5, 5)), Slot("a.bias", 0, IndexMap(5, 5))))},
        (),
        {"a.weight": (5, 3), "a.bias": (5,)},
    )
    assert verify(wrong, model, normal(9, 3)).guilty == ("g",)


def test_the_same_seed_gives_the_same_errors() -> None:
    model, inputs = reference_network("mobilenet"), reference_inputs("mobilenet")
    spec = discover(model, inputs)
    one, two = (verify(spec, model, inputs, generator=seeded(5)) for _ in range(2))
    assert one == two


def test_numbers_that_only_fit_float64_do_not_force_float32() -> None:
    """A mask filled with the least finite number of the dtype, as attention code makes it."""

    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            h = self.a(x)
            least = torch.full((4,), torch.finfo(h.dtype).min)
            return self.b(torch.max(h, least))

    model = build(Masked)
    found = verify(discover(model, X), model, X)
    assert found.passed
    assert found.dtype == torch.float64


def test_the_order_of_arguments_is_named() -> None:
    model, x = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).eval(), torch.ones(1, 3)
    spec = discover(model, x)
    order = r"The order is verify\(spec, model, inputs\)"
    with pytest.raises(SymmetryError, match=f"expected a SymmetrySpec first, found Sequential. {order}"):
        verify(model, spec, x)  # type: ignore[arg-type]
    with pytest.raises(ModelError, match=f"a torch.nn.Module after the spec, found Tensor. {order}"):
        verify(spec, x, model)  # type: ignore[arg-type]
