"""Nothing of the caller changes, whatever public function runs its module."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from replica_networks import CLASSES, EXAMPLES, KINDS, build, normal
from torch import Tensor, nn

import isthmus
from isthmus.batches import Batch
from isthmus.evaluation import bind, evaluate, require_deterministic
from isthmus.moments import SiteRunner, refresh_batchnorm
from isthmus.replica import contents
from isthmus.states import state_of
from isthmus.symmetry import function_change
from isthmus.theory import certify

pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*The .grad attribute of a Tensor that is not a leaf:UserWarning"),
]


class Counting(nn.Module):
    """Writes a saved buffer, another, and attributes, whenever it runs; its outputs do not see them."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norm, self.out = nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, CLASSES)
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))
        self.register_buffer("seen", torch.zeros(()), persistent=False)
        self.last: Tensor | None = None
        self.history: list[float] = []

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.seen.add_(len(x))
        self.history.append(1.0)
        self.last = x.mean()
        return self.out(self.norm(self.layer(x)).relu())


def counting() -> nn.Module:
    return _seeded(Counting)


def mixed_modes() -> nn.Module:
    """Parts in training that compute the same as in evaluation; a frozen part, and gradients that wait."""
    model = _seeded(
        lambda: nn.Sequential(nn.Linear(4, 6), nn.Sequential(nn.ReLU(), nn.Identity()), nn.Linear(6, CLASSES))
    )
    model[1].train()
    model[0].requires_grad_(False)
    model(normal(2, 4)).sum().backward()
    return model


def hooked() -> nn.Module:
    model = _seeded(lambda: nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, CLASSES)))
    seen: list[int] = []
    model[0].register_forward_hook(lambda module, args, output: seen.append(1))
    return model


def _seeded(factory: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return factory().eval()


MODULES: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "counting": (counting, normal(EXAMPLES, 4)),
    "mixed modes": (mixed_modes, normal(EXAMPLES, 4)),
    "hooked": (hooked, normal(EXAMPLES, 4)),
    **{
        kind: (lambda kind=kind: build(kind, 0), KINDS[kind][1])
        for kind in (
            "old weight norm",
            "old spectral norm",
            "pruned",
            "cached bias, attribute",
            "tied by data",
        )
    },
}


def _data(x: Tensor) -> list[Any]:
    return [(x, torch.arange(len(x)) % CLASSES)]


def _merged(model: nn.Module, x: Tensor) -> Any:
    return isthmus.merge([model, state_of(model)], align="weights", args=x, model=model)


def _aligned(model: nn.Module, x: Tensor) -> Any:
    return isthmus.align(model, model, batches=[x], method="activations").apply(model)


CALLS: dict[str, Callable[[nn.Module, Tensor], Any]] = {
    "bind": lambda m, x: bind(m, state_of(m))(Batch((x,))),
    "evaluate": lambda m, x: evaluate(m, _data(x)),
    "require_deterministic": lambda m, x: require_deterministic(m, Batch((x,))),
    "discover": lambda m, x: isthmus.discover(m, x),
    "verify": lambda m, x: isthmus.verify(isthmus.discover(m, x), m, x),
    "function_change": lambda m, x: function_change(isthmus.discover(m, x), {}, m, x),
    "align and apply": _aligned,
    "line": lambda m, x: isthmus.line(m, m, _data(x), points=3, bootstrap=0),
    "line with a refresh": lambda m, x: isthmus.line(
        m, m, _data(x), points=3, bootstrap=0, refresh="batchnorm"
    ),
    "merge": _merged,
    "refresh": lambda m, x: refresh_batchnorm(m, state_of(m), [x]),
    "dimension": lambda m, x: isthmus.dimension(m, [x]),
    "statistics": lambda m, x: SiteRunner(m, Batch((x,))).run(state_of(m), Batch((x,))),
}


def everything(model: nn.Module) -> dict[str, Any]:
    """Return all that a caller could find changed on a module."""
    found: dict[str, Any] = {}
    for path, module in model.named_modules():
        found[f"{path} mode"] = module.training
        for name, value in vars(module).items():
            if name not in ("_parameters", "_buffers", "_modules", "training"):
                found[f"{path}.{name}"] = (
                    id(value),
                    list(value) if isinstance(value, (dict, set, list)) else None,
                )
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None:
                found[f"{path}.{name}"] = (
                    id(tensor), tensor.data_ptr(), tensor._version, tensor.dtype, tensor.requires_grad,
                    tensor.tolist(), None if tensor.grad is None else tensor.grad.tolist(),
                )  # fmt: skip
    for place, leaves in contents(model).items():
        found[f"{place}"] = {k: v.tolist() if isinstance(v, Tensor) else v for k, v in leaves.items()}
    return found


FEW = ("align and apply", "line")
"""Calls that every module goes through; the first two go through all."""
PRODUCT = [(name, call) for k, name in enumerate(MODULES) for call in CALLS if k < 2 or call in FEW]


@pytest.mark.parametrize(("name", "call"), PRODUCT)
def test_nothing_of_the_caller_changes(name: str, call: str) -> None:
    factory, x = MODULES[name]
    model, inputs = factory(), x.clone()
    before = everything(model)
    streams = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
    CALLS[call](model, inputs)
    after = everything(model)
    assert [k for k in {*before, *after} if before.get(k) != after.get(k)] == []
    assert torch.equal(torch.get_rng_state(), streams[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == streams[1:]  # noqa: NPY002
    assert torch.equal(inputs, x)


def test_the_check_sees_a_change() -> None:
    for change in (
        lambda m: m(normal(2, 4)),
        lambda m: m.train(),
        lambda m: m.double(),
        lambda m: m.layer.register_forward_hook(print),
        lambda m: m.layer.requires_grad_(False),
        lambda m: m.history.append(2.0),
    ):
        model = counting()
        before = everything(model)
        change(model)
        assert everything(model) != before


def test_certificates_leave_the_network_alone() -> None:
    model = mixed_modes()
    before = everything(model)
    certify(model, model, [normal(5, 4)])
    assert everything(model) == before
