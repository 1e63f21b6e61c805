"""Copies that share nothing, or only tensors; states written into them; what is named when two modules differ."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from isthmus.batches import Batch
from isthmus.errors import ModelError
from isthmus.evaluation import bind
from isthmus.replica import (
    Replica,
    differences,
    hidden_tensors,
    hollow_copy,
    private_copy,
    rebuild,
    with_state,
)


class Odd(nn.Module):
    """Holds tensors wherever one can."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.arange(6.0).view(2, 3))
        self.rows = self.weight.data[1:]
        self.transposed = nn.Parameter(self.weight.data.t())
        self.register_buffer("wide", torch.ones(1).expand(4))
        self.register_buffer("numbers", torch.arange(3))
        self.bits = self.weight.data.view(torch.int32)
        self.made = self.weight * 2  # has a history, so deepcopy refuses it
        self.sparse = torch.eye(2).to_sparse()
        self.nested = {"a": [(self.weight,)], "b": {1: torch.zeros(2)}}
        self.function = self._function(self.weight, [self.weight], threading.Lock())

    @staticmethod
    def _function(weight: Tensor, held: list[Tensor], lock: Any) -> Any:
        def outer() -> Any:
            return weight, held, lock

        return lambda: outer()


def storages(model: nn.Module) -> set[int]:
    tensors = [*model.parameters(), *model.buffers(), *(h.tensor for h in hidden_tensors(model))]
    return {t.untyped_storage().data_ptr() for t in tensors if t.layout == torch.strided}


def test_a_private_copy_shares_memory_with_itself_only() -> None:
    model = Odd()
    copied = private_copy(model)
    assert storages(model).isdisjoint(storages(copied))
    assert type(copied.weight) is nn.Parameter
    with torch.no_grad():
        copied.weight.fill_(7.0)
    assert copied.rows.tolist() == [[7.0] * 3]
    assert copied.transposed.tolist() == [[7.0] * 2] * 3
    assert copied.bits.unique().tolist() == torch.tensor([7.0]).view(torch.int32).tolist()
    assert copied.nested["a"][0][0] is copied.weight
    weight, held, lock = copied.function()
    assert weight is copied.weight
    assert held[0] is copied.weight
    assert lock is model.function()[2]
    assert model.weight.tolist() == [[0, 1, 2], [3, 4, 5]]
    assert model.function()[0] is model.weight
    assert copied.wide.tolist() == [1.0] * 4
    assert copied.made.grad_fn is None


def test_a_hollow_copy_shares_every_tensor() -> None:
    model = Odd()
    copied = hollow_copy(model)
    assert storages(model) == storages(copied)
    copied.nested["a"].append("new")
    copied.extra = 1
    assert len(model.nested["a"]) == 1
    assert not hasattr(model, "extra")


def test_another_dtype_is_taken_by_all_views() -> None:
    model = Odd()
    del model.bits
    copied = private_copy(model, lambda t: torch.float64)
    assert copied.weight.dtype == copied.rows.dtype == copied.transposed.dtype == torch.float64
    assert copied.numbers.dtype == torch.int64
    assert copied.rows.untyped_storage().data_ptr() == copied.weight.untyped_storage().data_ptr()
    assert model.weight.dtype == torch.float32


def test_what_cannot_be_copied_is_shared() -> None:
    class Locked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.lock = nn.Linear(2, 2), threading.Lock()
            self.again = [self.layer.weight]

        def forward(self, x: Tensor) -> Tensor:
            with self.lock:
                return self.layer(x) @ self.again[0]

    model = Locked().eval()
    copied = private_copy(model)
    assert copied.lock is model.lock
    assert copied.again[0] is copied.layer.weight
    assert copied.layer.weight is not model.layer.weight
    other = Locked().eval()
    x = torch.ones(3, 2)
    torch.testing.assert_close(bind(model, other.state_dict())(Batch((x,))), other(x).detach())


def test_modes_of_single_modules_survive() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.ReLU(), nn.Tanh())).eval()
    model[1][0].train()
    rebuild(model)
    assert [m.training for m in model.modules()] == [False, False, False, True, False]


def test_a_module_that_refuses_train_is_left_alone() -> None:
    class Exported(nn.Linear):
        def train(self, mode: bool = True) -> Any:
            raise NotImplementedError

    model = Exported(2, 2)
    rebuild(model)
    assert with_state(model, nn.Linear(2, 2).state_dict()) is not model


def test_states_of_another_dtype_take_turns() -> None:
    model, x = nn.Linear(3, 2).eval(), Batch((torch.ones(2, 3),))
    replica = Replica(model)
    low, high = ({k: v.to(d) for k, v in model.state_dict().items()} for d in (torch.bfloat16, torch.float64))
    runs = [bind(replica, low), bind(replica, high), bind(replica)]
    for _ in range(2):
        assert [run(x).dtype for run in runs] == [torch.bfloat16, torch.float64, torch.float32]


def test_a_state_changed_in_place_is_put_in_again() -> None:
    model, x = nn.Linear(3, 2).eval(), Batch((torch.ones(2, 3),))
    state = {k: v.clone() for k, v in model.state_dict().items()}
    run = bind(model, state)
    first = run(x)
    state["bias"] += 1
    torch.testing.assert_close(run(x), first + 1)


def test_only_modules_have_copies() -> None:
    with pytest.raises(ModelError, match=r"Expected a torch\.nn\.Module, since its code is run, found dict"):
        Replica({})  # type: ignore[arg-type]


def test_differences_are_named_by_place() -> None:
    def network(eps: float, scale: float) -> nn.Module:
        model = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2, eps=eps))
        model[0].scale = torch.tensor(scale)
        return model

    assert differences(network(1e-5, 1.0), network(1e-5, 1.0)) == []
    assert differences(network(1e-5, 1.0), network(1e-3, 2.0)) == [
        "the tensor '0.scale'",
        "'1.eps' (1e-05 against 0.001)",
    ]


class Partners(nn.Module):
    """Its weights refer to others, the one in an attribute, the other in a function."""

    def __init__(self) -> None:
        super().__init__()
        self.f, self.g = nn.Linear(3, 3), nn.Linear(3, 3)
        with torch.no_grad():
            for p in self.parameters():
                p.normal_()
        f: Any = self.f
        g: Any = self.g
        f.weight.partner = g.weight
        g.weight.view_of = f.weight.data[:2]
        f.bias.about = {"of": [g], "call": lambda w=g.bias: w * 2}

    def forward(self, x: Tensor) -> Tensor:
        f: Any = self.f
        w, about = f.weight, f.bias.about
        h = self.f(x) @ w.partner + about["of"][0](x) + about["call"]()
        return h @ w.partner.view_of.T


def test_attributes_of_parameters_lead_to_the_copy() -> None:
    model: Any = Partners().eval()
    other, x = Partners().eval(), torch.randn(4, 3)
    copied: Any = private_copy(model)
    weight = copied.f.weight
    assert weight.partner is copied.g.weight
    assert copied.g.weight.view_of.data_ptr() == weight.data_ptr()
    assert copied.f.bias.about["of"][0] is copied.g
    assert copied.f.bias.about["call"]().tolist() == (copied.g.bias * 2).tolist()
    assert model.f.weight.partner is model.g.weight
    torch.testing.assert_close(bind(model, other.state_dict())(Batch((x,))), other(x).detach())


def test_a_function_that_captured_a_dictionary_of_parameters() -> None:
    model = nn.Linear(2, 2)
    scales = {model.weight: 2.0}
    model.scale = lambda w: scales.get(w, 1.0)
    copied: Any = private_copy(model)
    assert copied.scale(copied.weight) == 2.0
