"""Output trees: every tensor has a name of its own, is preserved and compared, whatever it comes in."""

from __future__ import annotations

from collections import OrderedDict, UserDict, namedtuple
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from symmetry_helpers import build, normal
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from isthmus import align
from isthmus.errors import ModelError, SymmetryError
from isthmus.symmetry import (
    AxisGroup,
    IndexMap,
    Slot,
    SymmetrySpec,
    discover,
    discover_from_trace,
    trace,
    verify,
)

X = normal(4, 3)
Pair = namedtuple("Pair", ["first", "second"])


class Two(nn.Module):
    """Two heads of a hidden layer, returned in some container."""

    def __init__(self, tree: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.tree = tree
        self.stem, self.one, self.two = nn.Linear(3, 5), nn.Linear(5, 4), nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Any:
        h = self.stem(x).relu()
        return self.tree(self.one(h), self.two(h))


@dataclass
class Plain:
    """A dataclass as people write them."""

    sample: Tensor
    extra: Tensor | None = None
    note: str = "text"


@dataclass
class Nested:
    inner: Plain
    rest: list[Any] = field(default_factory=list)


class Foreign(OrderedDict[Any, Any]):
    """The base of outputs as diffusion libraries have it: a dictionary and a dataclass, without what is None."""

    def __post_init__(self) -> None:
        for one in fields(self):  # type: ignore[arg-type]
            value = getattr(self, one.name)
            if value is not None:
                self[one.name] = value

    def __getitem__(self, key: Any) -> Any:
        return dict(self.items())[key] if isinstance(key, str) else tuple(self.values())[key]


@dataclass
class Sampled(Foreign):
    sample: Tensor
    hidden: Tensor | None = None


class Settings:
    """Something that holds no tensor."""

    width = 3


TREES: dict[str, tuple[Callable[[Tensor, Tensor], Any], list[str]]] = {
    "number and text": (lambda a, b: {1: a, "1": b}, ["[1]", "['1']"]),
    "dot and level": (lambda a, b: {"a": {"b": a}, "a.b": b}, ["['a']['b']", "['a.b']"]),
    "dot and level below": (lambda a, b: {"a": {"b": {"c": a}}, "a.b": b}, ["a.b.c", "['a.b']"]),
    "nothing and output": (lambda a, b: {"": a, "output": b}, ["['']", "output"]),
    "nothing at two levels": (lambda a, b: {"": {"": a}, ".": b}, ["['']['']", "['.']"]),
    "list and key": (lambda a, b: {"a": [a], "a.0": b}, ["['a'][0]", "['a.0']"]),
    "tuple key": (lambda a, b: {(1, 2): a, "(1, 2)": b}, ["[(1, 2)]", "['(1, 2)']"]),
    "truth value and text": (lambda a, b: {True: a, "True": b}, ["[True]", "['True']"]),
    "written as the other": (lambda a, b: {"['a']": a, "a": b}, ["[\"['a']\"]", "a"]),
    "tuple": (lambda a, b: (a, b), ["0", "1"]),
    "dictionary": (lambda a, b: {"logits": a, "features.last": b}, ["logits", "features.last"]),
    "nested": (lambda a, b: {"x": [None, (a,)], "y": {"z": b}}, ["x.1.0", "y.z"]),
    "named tuple": (lambda a, b: Pair(a, [b]), ["first", "second.0"]),
    "dataclass": (Plain, ["sample", "extra"]),
    "dataclass in a list": (lambda a, b: [Plain(a), Plain(b)], ["0.sample", "1.sample"]),
    "dataclass of dataclasses": (lambda a, b: Nested(Plain(a), [b]), ["inner.sample", "rest.0"]),
    "dictionary and dataclass": (Sampled, ["sample", "hidden"]),
    "ordered": (lambda a, b: OrderedDict(z=a, a=b), ["z", "a"]),
    "foreign mapping": (lambda a, b: UserDict({"a": a, "b": [b]}), ["a", "b.0"]),
    "beside settings": (
        lambda a, b: {"a": a, "b": b, "config": Settings(), "none": None, "n": 3},
        ["a", "b"],
    ),
}


def model_of(tree: Callable[[Tensor, Tensor], Any]) -> nn.Module:
    return build(lambda: Two(tree))


def freed(spec: SymmetrySpec, head: str) -> SymmetrySpec:
    """Return the spec with the outputs of a head moving: they are outputs of the model, so this is wrong."""
    slots = (Slot(f"{head}.weight", 0, IndexMap(4, 4)), Slot(f"{head}.bias", 0, IndexMap(4, 4)))
    return spec.with_group(AxisGroup("freed", 4, slots))


MANY = (
    "tuple",
    "dictionary",
    "truth value and text",
    "nothing at two levels",
    "dataclass in a list",
    "ordered",
)


@pytest.mark.parametrize("tree", [pytest.param(t, marks=pytest.mark.slow) if t in MANY else t for t in TREES])
def test_every_output_has_a_name_is_preserved_and_compared(tree: str) -> None:
    model, names = model_of(TREES[tree][0]), TREES[tree][1]
    traced = trace(model, X)
    spec = discover_from_trace(traced)
    assert [g.size for g in spec.groups.values()] == [5]
    found = verify(spec, model, X, draws=1)
    assert found.passed
    assert list(found.errors) == names == list(traced.outputs)
    for position, (name, head) in enumerate(zip(names, ("one", "two"), strict=True)):
        assert verify(freed(spec, head), model, X, draws=1).guilty == ("freed",)
        assert list(traced.select_outputs(name)) == [name]
        assert list(traced.select_outputs(position)) == [name]


def test_a_name_that_can_mean_two_outputs_is_refused() -> None:
    model = model_of(TREES["dot and level"][0])
    said = r"outputs: 'a.b' can mean \['a'\]\['b'\] or \['a.b'\] of what the model returns. Write it in that form"
    with pytest.raises(SymmetryError, match=said):
        discover(model, X, outputs="a.b")
    spec = discover(model, X, outputs="['a.b']")
    assert spec.outputs == ("['a.b']",)
    assert sorted(g.size for g in spec.groups.values()) == [4, 5]
    assert list(verify(SymmetrySpec.from_json(spec.to_json()), model, X).require().errors) == ["['a.b']"]
    assert list(trace(model, X).select_outputs("a")) == ["['a']['b']"]


def test_a_level_selects_what_is_below_and_not_what_begins_alike() -> None:
    model = model_of(lambda a, b: {"a": {"c": a, "d": [a]}, "a.b": b, "ab": b})
    assert list(trace(model, X).outputs) == ["a.c", "a.d.0", "a.b", "ab"]
    assert list(trace(model, X).select_outputs("a")) == ["a.c", "a.d.0"]
    with pytest.raises(SymmetryError, match=r"outputs: no output 'b'; the model returns \['a.c', 'a.d.0'"):
        discover(model, X, outputs="b")


def test_an_output_returned_twice_is_compared_twice() -> None:
    model = model_of(lambda a, b: (a, a, b, None, [b]))
    assert list(verify(discover(model, X), model, X).errors) == ["0", "1", "2", "4.0"]
    assert verify(freed(discover(model, X, outputs=1), "one"), model, X).guilty == ("freed",)


class Key:
    """A key whose text says nothing."""

    def __repr__(self) -> str:
        return "key"


def test_keys_that_print_alike_are_counted() -> None:
    model = model_of(lambda a, b: {KEYS[0]: a, KEYS[1]: b})
    spec = discover(model, X)
    assert list(verify(spec, model, X).errors) == ["key", "key#2"]
    for head in ("one", "two"):
        assert verify(freed(spec, head), model, X).guilty == ("freed",)


KEYS = (Key(), Key())


def test_tensors_hidden_in_an_object_are_refused() -> None:
    model = model_of(lambda a, b: {"a": a, "rest": SimpleNamespace(inside=[b])})
    with pytest.raises(
        ModelError, match="Two returns a SimpleNamespace that holds tensors which cannot be seen"
    ):
        discover(model, X)


def test_a_network_without_outputs_cannot_be_verified() -> None:
    model = model_of(lambda a, b: {"note": "nothing"})
    with pytest.raises(ModelError, match="Two returns no tensor, so there is nothing to compare"):
        verify(SymmetrySpec({}, (), {}), model, X)


@pytest.mark.parametrize("tree", ["dataclass", "dictionary and dataclass"])
def test_networks_that_return_dataclasses_are_aligned(tree: str) -> None:
    a, b = build(lambda: Two(TREES[tree][0])), build(lambda: Two(TREES[tree][0]), seed=1)
    found = align(a, b, args=X, method="weights", outputs="sample")
    assert found.spec.outputs == ("sample",)
    assert found.verification_error is not None
    assert found.verification_error < 1e-12
    moved = found.apply(b)(X)
    assert torch.allclose(moved.sample, b(X).sample, atol=1e-5)
    assert type(moved) is type(b(X))


class Unnamed(OrderedDict[str, Any]):
    """A mapping that its library registered with torch, without saying what its parts are called."""


pytree.register_pytree_node(
    Unnamed,
    lambda found: (list(found.values()), list(found)),
    lambda values, keys: Unnamed(zip(keys, values, strict=True)),
)


@pytest.mark.parametrize(
    ("tree", "names"),
    [
        (lambda a, b: Unnamed(sample=a, extra=b), ["sample", "extra"]),
        (lambda a, b: (a, Unnamed(extra=b)), ["0", "1.extra"]),
        (lambda a, b: {"all": Unnamed(sample=a, rest=[b])}, ["all.sample", "all.rest.0"]),
        (lambda a, b: Unnamed(inner=Unnamed(sample=a), note="text", extra=b), ["inner.sample", "extra"]),
    ],
)
def test_mappings_registered_without_names_have_theirs(tree: Callable[..., Any], names: list[str]) -> None:
    model = build(lambda: Two(tree))
    assert list(trace(model, (X,)).outputs) == names
    spec = discover(model, X, outputs=names[1])
    found = verify(spec, model, X, outputs=names[1])
    assert found.passed
    assert list(found.errors) == [names[1]]
