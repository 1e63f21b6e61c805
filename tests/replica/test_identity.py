"""Networks that know their parts by identity are refused by name; others are left in peace."""

from __future__ import annotations

import re
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from isthmus import line
from isthmus.errors import ModelError
from isthmus.replica import hollow_copy, private_copy

GLOBAL: dict[int, float] = {}
GLOBAL_WEAK: weakref.WeakKeyDictionary[nn.Module, float] = weakref.WeakKeyDictionary()


class Net(nn.Module):
    OF_CLASS: dict[Any, float] = {}

    def __init__(self, hold: Callable[[Any], None] | None = None) -> None:
        super().__init__()
        self.f1, self.f2 = nn.Linear(3, 3), nn.Linear(3, 3)
        self.register_buffer("shift", torch.zeros(3))
        self.d: Any = {}
        if hold is not None:
            hold(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.f2(self.f1(x)) * self.d.get(id(self.f2.weight), 1.0) + self.shift


class Reading(Net):
    def forward(self, x: Tensor) -> Tensor:
        scale = GLOBAL.get(id(self.f2.weight), 1.0) * GLOBAL_WEAK.get(self.f1, 1.0)
        return super().forward(x) * scale


@pytest.fixture(autouse=True)
def _clean() -> Any:
    yield
    GLOBAL.clear()
    GLOBAL_WEAK.clear()
    Net.OF_CLASS.clear()


def weak(kind: Any, *entry: Any) -> Any:
    made = kind()
    made[entry[0]] = entry[1]
    return made


class Object:
    def __init__(self, value: Any) -> None:
        self.value = value


HELD: dict[str, tuple[Callable[[Any], Any], str, str]] = {
    "id of a weight": (
        lambda n: {id(n.f2.weight): 2.0},
        "'d' holds the id() or data_ptr() of 'f2.weight'",
        "",
    ),
    "address": (lambda n: {n.f1.bias.data_ptr(): 2.0}, "'d' holds the id() or data_ptr() of 'f1.bias'", ""),
    "storage": (lambda n: {n.shift.untyped_storage().data_ptr(): 2}, "data_ptr() of 'shift'", ""),
    "id of a module": (lambda n: {id(n.f2): 2.0}, "'d' holds the id() or data_ptr() of 'f2'", "modules"),
    "in a tuple": (lambda n: {("scale", id(n.f2.weight)): 2.0}, "'d' holds the id()", ""),
    "in words": (lambda n: {str(id(n.f2.weight)): 2.0}, "'d' holds the id()", ""),
    "set": (
        lambda n: {"skip": {id(n.f1.weight)}},
        "\"d['skip']\" holds the id() or data_ptr() of 'f1.weight'",
        "",
    ),
    "list": (lambda n: {"skip": [id(n.f1.weight)]}, "\"d['skip']\" holds the id()", ""),
    "object": (
        lambda n: {"o": Object(frozenset([id(n.f1)]))},
        "\"d['o'].value\" holds the id()",
        "modules",
    ),
    "function": (lambda n: {"f": (lambda k: lambda w: id(w) in k)({id(n.f1.weight)})}, "holds the id()", ""),
    "weak keys": (
        lambda n: weak(weakref.WeakKeyDictionary, n.f2, 2.0),
        "'d' is a WeakKeyDictionary that holds 'f2'",
        "modules",
    ),
    "weak tensors": (
        lambda n: weak(WeakIdKeyDictionary, n.f2.weight, 2.0),
        "'d' is a WeakIdKeyDictionary that holds 'f2.weight'",
        "",
    ),
    "weak values": (
        lambda n: weak(weakref.WeakValueDictionary, "w", n.f2.weight),
        "'d' is a WeakValueDictionary that holds 'f2.weight'",
        "",
    ),
    "weak set": (lambda n: weakref.WeakSet([n.f2]), "'d' is a WeakSet that holds 'f2'", "modules"),
}


@pytest.mark.parametrize("kind", HELD)
def test_parts_known_by_identity_are_refused(kind: str) -> None:
    value, words, shared = HELD[kind]
    model = Net(lambda n: setattr(n, "d", value(n))).eval()
    with pytest.raises(ModelError, match="Net knows its parts by identity: .*" + re.escape(words)):
        private_copy(model)
    if shared:  # a copy that shares tensors has modules of its own
        with pytest.raises(ModelError, match="Let it go by names"):
            hollow_copy(model)
    else:
        assert hollow_copy(model).f2.weight is model.f2.weight


def test_attributes_of_tensors_are_looked_at() -> None:
    model = Net()
    model.f1.weight.d = {id(model.f2.weight): 2.0}  # type: ignore[attr-defined]
    with pytest.raises(ModelError, match=r"'f1\.weight\.d' holds the id\(\)"):
        private_copy(model)


def test_classes_and_global_variables_are_looked_at() -> None:
    model = Reading()
    private_copy(model)
    Net.OF_CLASS[id(model.f1.weight)] = 2.0
    with pytest.raises(ModelError, match=r"'Net\.OF_CLASS' holds the id\(\)"):
        private_copy(model)
    Net.OF_CLASS.clear()
    GLOBAL[id(model.f2.weight)] = 2.0
    with pytest.raises(ModelError, match=r"'GLOBAL' holds the id\(\)"):
        private_copy(model)
    GLOBAL.clear()
    GLOBAL_WEAK[model.f1] = 2.0
    with pytest.raises(ModelError, match="'GLOBAL_WEAK' is a WeakKeyDictionary that holds 'f1'"):
        private_copy(model)


def test_the_line_refuses_it_too() -> None:
    a, b = (Net(lambda n: n.d.update({id(n.f2.weight): 3.0})).eval() for _ in range(2))
    with pytest.raises(ModelError, match="knows its parts by identity"):
        line(a, b, [(torch.randn(4, 3), torch.tensor([0, 1, 2, 0]))], points=3)


def test_other_numbers_and_containers_are_left_in_peace() -> None:
    elsewhere = nn.Linear(2, 2)
    model = Net()
    model.d = {id(elsewhere): 2.0, 0: 1, True: 1, "f2.weight": 3.0, model.f1.weight: 4.0, model.f2: 5.0}
    model.weak = weak(weakref.WeakKeyDictionary, elsewhere, 1.0)
    model.compiled = [torch.compile(nn.Linear(2, 2), backend="eager")]  # notes its identity
    model.rnn = nn.LSTM(3, 2)  # holds weak references to its own weights
    copied = private_copy(model)
    assert copied.d[copied.f1.weight] == 4.0
    assert copied.d[copied.f2] == 5.0
