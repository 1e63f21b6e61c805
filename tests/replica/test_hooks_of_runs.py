"""Networks that register hooks in their first call, as those of transformers do to collect hidden states."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import isthmus
from isthmus.replica import Replica


class Collecting(nn.Module):
    """Reads what its layers return through hooks; registered twice, each layer would be collected twice."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.layers = nn.ModuleList([nn.Linear(6, 6) for _ in range(3)])
            self.head = nn.Linear(18, 4)
        self.installed = False

    def forward(self, x: Tensor) -> Tensor:
        """Collect the outputs of all layers, and read the first three."""
        if not self.installed:
            for layer in self.layers:
                layer.register_forward_hook(self._collect)
            self.installed = True
        self.collected: list[Tensor] = []
        for layer in self.layers:
            x = torch.relu(layer(x))
        found = torch.cat(self.collected[:3], -1)
        del self.collected
        return self.head(found)

    def _collect(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self.collected.append(output)


def own_loss(model: nn.Module, x: Tensor, y: Tensor) -> float:
    with torch.no_grad():
        return float(F.cross_entropy(copy.deepcopy(model)(x).double(), y))


@pytest.mark.parametrize("called", [(), ("a",), ("b",), ("a", "b")])
def test_a_line_is_the_same_whether_or_not_its_ends_have_run(called: tuple[str, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(9, 6, generator=generator)
    y = torch.randint(0, 4, (9,), generator=generator)
    ends = {"a": Collecting(0).eval(), "b": Collecting(1).eval()}
    wanted = [own_loss(ends["a"], x, y), own_loss(ends["b"], x, y)]
    for name in called:
        ends[name](x)
    found = isthmus.line(ends["a"], ends["b"], [(x, y), (x, y)], points=3).curves["data"].loss
    assert found[[0, -1]].tolist() == pytest.approx(wanted, abs=1e-6)


def test_states_of_one_copy_give_what_each_gives_alone() -> None:
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    one, two = Collecting(0).eval(), Collecting(1).eval()
    states = [{k: t.detach() for k, t in m.state_dict().items()} for m in (one, two)]
    wanted = [copy.deepcopy(m)(x) for m in (one, two)]
    replica = Replica(one)
    replica.examine(states[0], (x,), {})
    for k in (0, 1, 1, 0):
        torch.testing.assert_close(replica.run_on(states[k], (x,), {}), wanted[k])
    assert not one.installed
    assert not one.layers[0]._forward_hooks
