"""Rules can be called with whatever their operators can; where one fails, tests are told and users are safe."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from symmetry_helpers import Net, build, normal
from torch import nn

from isthmus import SymmetryError, discover
from isthmus.symmetry import _operation, _uses, strict_rules

X = normal(4, 5)

NOT_TRACED = {"aten.einsum.sublist", *(f"aten.{n}.data" for n in ("lstm", "gru", "rnn_tanh", "rnn_relu"))}
"""Not callable from Python; packed sequences are written in other operators when they are traced."""


def overloads(name: str) -> list[torch._ops.OpOverload]:
    """The overloads of an operator that compute tensors from tensors, and write into none."""
    space, _, operator = name.partition(".")
    packet: Any = getattr(getattr(torch.ops, space), operator)
    listed = [getattr(packet, overload) for overload in packet.overloads()]
    return [
        o
        for o in listed
        if not o._schema.is_mutable
        and str(o) not in NOT_TRACED
        and any(str(a.type) in ("Tensor", "List[Tensor]") for a in o._schema.arguments)
        and all("Tensor" in str(r.type) for r in o._schema.returns)
    ]


def test_every_rule_takes_the_arguments_of_every_overload() -> None:
    checked, faults = 0, []
    for name, (function, _) in _operation._RULES.items():
        if not name.startswith("aten."):
            continue
        signature = inspect.signature(function)
        for overload in overloads(name):
            named = ["x" if a.name in ("self", "input") else a.name for a in overload._schema.arguments]
            checked += 1
            try:
                signature.bind(None, **dict.fromkeys(named))
            except TypeError as error:
                faults.append(f"{overload}: {error}")
    assert checked > 300
    assert faults == []


def test_a_mistake_in_how_tensors_are_used_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(lambda: Net(lambda m, x: m.b(m.a(x).relu()), a=nn.Linear(5, 6), b=nn.Linear(6, 3)))

    def fails(walk: Any, node: Any) -> Any:
        return node.args[7]

    monkeypatch.setattr(_uses._OriginWalk, "_sum_of_products", fails)
    with pytest.raises(SymmetryError, match=r"the rule for aten\.linear in module 'a'.* raised IndexError"):
        discover(model, X)
    with strict_rules(False):
        spec = discover(model, X)
    assert {slot.role for slot in spec.groups["a"].slots} == {""}


def test_rules_are_strict_only_within() -> None:
    from isthmus.symmetry._strict import report_failure

    node = torch.fx.Graph().call_function(torch.ops.aten.relu.default, ())
    with strict_rules(False):
        report_failure(node, None)
    with pytest.raises(
        SymmetryError, match=r"aten\.relu in module '\(the model\)'.*another shape.*Mend the rule"
    ):
        report_failure(node, None)
