"""The short way to a functional graph gives the graph of the long one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from isthmus.symmetry import _functional
from isthmus.symmetry._functional import composites, functional


class Net(nn.Module):
    def __init__(self, forward: Callable[..., Any], **parts: nn.Module) -> None:
        super().__init__()
        self.work = forward
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, *inputs: Tensor) -> Any:
        return self.work(self, *inputs)


def attention(m: Any, x: Tensor) -> Tensor:
    q, k, v = m.qkv(x).chunk(3, -1)
    q, k, v = (p.reshape(2, 3, 2, 4).transpose(1, 2) for p in (q, k, v))
    mixed = nn.functional.scaled_dot_product_attention(q, k, v).movedim(1, 2).flatten(-2).contiguous()
    return m.drop(m.out(mixed)) + x.to(torch.float32).expand_as(x)


def gated(m: Any, x: Tensor) -> Tensor:
    y = m.norm(m.conv(x))
    y.mul_(torch.sigmoid(y))
    with torch.no_grad():
        scale = y.mean((2, 3)).unflatten(1, (2, 2)).view_as(torch.zeros(2, 2, 2)).sum(-1)
    return m.head(m.pool(m.act(y)).flatten(1)) * scale[:, :1].narrow(1, 0, 1)


def recurrent(m: Any, x: Tensor) -> Tensor:
    return m.out(m.cell(x)[0])


def transposed(m: Any, x: Tensor) -> Tensor:
    return m.out(x.mT @ x)


SHORT = {
    "attention": (
        Net(attention, qkv=nn.Linear(8, 24), out=nn.Linear(8, 8), drop=nn.Dropout()),
        torch.randn(2, 3, 8),
    ),
    "gated": (
        Net(
            gated,
            conv=nn.Conv2d(3, 4, 3),
            norm=nn.BatchNorm2d(4),
            act=nn.ReLU(inplace=True),
            pool=nn.AdaptiveAvgPool2d(1),
            head=nn.Linear(4, 2),
        ),
        torch.randn(2, 3, 6, 6),
    ),
    "recurrent": (
        Net(recurrent, cell=nn.LSTM(3, 4, 2, batch_first=True), out=nn.Linear(4, 2)),
        torch.randn(2, 5, 3),
    ),
}
LONG = (Net(transposed, out=nn.Linear(3, 2)), torch.randn(4, 3))


def described(program: ExportedProgram) -> list[tuple[Any, ...]]:
    def of(value: Any) -> Any:
        return (value.shape, value.dtype, value.stride()) if isinstance(value, Tensor) else value

    nodes = [
        (n.op, n.name, n.target, str(n.args), str(n.kwargs), pytree.tree_map(of, n.meta.get("val")))
        for n in program.graph.nodes
    ]
    modules = [str(n.meta.get("nn_module_stack")) for n in program.graph.nodes]
    return [*nodes, tuple(modules), (str(program.graph_signature),)]


def exported(model: nn.Module, x: Tensor) -> ExportedProgram:
    return torch.export.export(model.eval(), (x,))


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("name", SHORT)
def test_the_short_way_gives_the_same_graph(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    program = exported(*SHORT[name])
    long = program.run_decompositions({})
    monkeypatch.setattr(ExportedProgram, "run_decompositions", None)  # the short way does without it
    assert described(functional(program)) == described(long)


def test_an_operator_that_is_not_listed_goes_the_long_way() -> None:
    program = exported(*LONG)
    assert composites(program.graph_module) is None
    assert described(functional(program)) == described(program.run_decompositions({}))


def test_another_version_of_pytorch_goes_the_long_way(monkeypatch: pytest.MonkeyPatch) -> None:
    program = exported(*SHORT["attention"])
    long = program.run_decompositions({})
    monkeypatch.delattr(torch._export.utils, "_special_op_to_preserve_cia")
    assert described(functional(program)) == described(long)


def test_the_list_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    program = exported(*SHORT["attention"])
    assert composites(program.graph_module) is not None
    monkeypatch.setattr(_functional, "_MOVES", frozenset())
    assert composites(program.graph_module) is None
