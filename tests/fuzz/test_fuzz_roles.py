"""Random networks that are linear in their input, written in many ways: what their roles let act changes nothing."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from isthmus.couplings import Coupling, Linear, Monomial, Rotation
from isthmus.states import state_of
from isthmus.symmetry import Relabelling, discover

Step = Callable[[Tensor], Tensor]


class Program(nn.Module):
    """Ten random steps or so on vectors."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.pick, self.names = random.Random(seed), 0
        self.generator = torch.Generator().manual_seed(seed)
        self.matrices: list[nn.Parameter] = []
        self.steps: list[Step] = []
        width = 4
        kinds = [f for name, f in sorted(vars(Program).items()) if name.startswith("add_")]
        for k in range(self.pick.randint(3, 8)):
            step, width = self.pick.choice(kinds[-1:] if k == 0 else kinds)(self, width)
            self.steps.append(step)
        last = self.new(2, width)
        self.steps.append(lambda h: F.linear(h, last))

    def new(self, *shape: int) -> nn.Parameter:
        self.names += 1
        drawn = torch.randn(shape, generator=self.generator).double() + 0.1
        self.register_parameter(f"p{self.names}", nn.Parameter(drawn))
        return getattr(self, f"p{self.names}")

    def matrix(self, rows: int, columns: int) -> Tensor:
        """Return a matrix: new, or one that is in use already."""
        alike = [m for m in self.matrices if m.shape == (rows, columns)]
        if alike and self.pick.random() < 0.3:
            return self.pick.choice(alike)
        self.matrices.append(self.new(rows, columns))
        return self.matrices[-1]

    def forward(self, x: Tensor) -> Tensor:
        for step in self.steps:
            x = step(x)
        return x

    def add_bias(self, n: int) -> tuple[Step, int]:
        b = self.new(n)
        return self.pick.choice([lambda h: h + b, lambda h: h - b, lambda h: b - h]), n

    def add_gain(self, n: int) -> tuple[Step, int]:
        g = self.new(n)
        return self.pick.choice(
            [lambda h: h * g, lambda h: h / g, lambda h: g.exp() * h, lambda h: (1 + g) * h]
        ), n

    def add_norm(self, n: int) -> tuple[Step, int]:
        mean, var, gain = self.new(n), self.new(n), self.new(n)
        return lambda h: F.batch_norm(h, mean, var.square() + 0.5, gain, mean * 2.0), n

    def add_depthwise(self, n: int) -> tuple[Step, int]:
        w, b = self.new(n, 1, 1), self.new(n)
        return lambda h: F.conv1d(h[:, :, None], w, b, groups=n)[:, :, 0], n

    def add_grouped(self, n: int) -> tuple[Step, int]:
        if n % 2:
            return self.add_depthwise(n)
        w, v = self.new(6, n // 2, 1), self.new(n, 3, 1)
        forth = lambda h: F.conv1d(h[:, :, None], w, groups=2)[:, :, 0]  # noqa: E731
        back = lambda h: F.conv_transpose1d(h[:, :, None], v, groups=2)[:, :, 0]  # noqa: E731
        return self.pick.choice([forth, back]), 6

    def add_residual(self, n: int) -> tuple[Step, int]:
        w = self.matrix(n, n)
        return self.pick.choice(
            [lambda h: h + h @ w, lambda h: h + F.linear(h, w), lambda h: h - (w @ h.T).T]
        ), n

    def add_bottleneck(self, n: int) -> tuple[Step, int]:
        a, b = self.new(3, n), self.matrix(n, 3)
        return self.pick.choice(
            [lambda h: h + F.linear(F.linear(h, a), b), lambda h: h + F.linear(h, b @ a)]
        ), n

    def add_low_rank(self, n: int) -> tuple[Step, int]:
        w, a, b = self.matrix(5, n), self.new(2, n), self.new(5, 2)
        return self.pick.choice([lambda h: F.linear(h, w + 0.5 * b @ a), lambda h: h @ (w.T - (b @ a).T)]), 5

    def add_parts(self, n: int) -> tuple[Step, int]:
        cut, w, v = n // 2, self.matrix(6, n // 2), self.matrix(6, n - n // 2)
        joined = lambda h: F.linear(h, torch.cat([w, v], 1))  # noqa: E731
        return self.pick.choice([lambda h: F.linear(h[:, :cut], w) + h[:, cut:] @ v.T, joined]), 6

    def add_dense(self, n: int) -> tuple[Step, int]:
        w = self.matrix(3, n)
        return lambda h: torch.cat([h, F.linear(h, w)], 1), n + 3

    def add_heads(self, n: int) -> tuple[Step, int]:
        if n % 2:
            return self.add_dense(n)
        w, v = self.new(2, n // 2, 3), self.matrix(6, n)
        cut = lambda h: torch.einsum("bkd,kdo->bko", h.view(-1, 2, n // 2), w).flatten(1)  # noqa: E731
        viewed = lambda h: torch.einsum("bi,kdi->bkd", h, v.view(2, 3, n)).reshape(-1, 6)  # noqa: E731
        return self.pick.choice([cut, viewed]), 6

    def add_layer(self, n: int) -> tuple[Step, int]:
        m = self.pick.choice([4, 5, 6])
        w, v, b = self.matrix(m, n), self.matrix(n, m), self.new(m)
        ways: list[Step] = [
            lambda h: F.linear(h, w, b),
            lambda h: torch.addmm(b, h, w.t()),
            lambda h: h @ v,
            lambda h: torch.einsum("...i,io", h, v) + b,
            lambda h: (w @ h.T).T * 2.0,
            lambda h: torch.einsum("oi,bi->bo", w, h),
            lambda h: F.linear(h, v.T / 3.0, b),
            lambda h: h.matmul(torch.stack([w.T, v]).sum(0)),
            lambda h: F.conv1d(h[:, :, None], w[:, :, None], b)[:, :, 0],
            lambda h: F.conv_transpose1d(h[:, :, None], v[:, :, None], b).squeeze(-1),
            lambda h: h @ w.view(-1).reshape(m, n).permute(1, 0).contiguous(),
        ]
        return self.pick.choice(ways), m


def coupling(words: set[str], size: int, generator: torch.Generator) -> Coupling | None:
    """Return a coupling of the largest kind that slots of these roles take; None: permutations only."""
    one, two = (torch.linalg.qr(torch.randn(size, size, generator=generator).double()).Q for _ in range(2))
    if words <= {"holds", "reads"}:
        return Linear(one @ torch.diag(torch.linspace(0.5, 2.0, size).double()) @ two)
    if words <= {"holds", "reads", "both"}:
        return Rotation(one)
    if words <= {"holds", "reads", "scales"}:
        return Monomial(
            torch.randperm(size, generator=generator), torch.linspace(-2.0, 1.5, size).double() + 0.1
        )
    return None


def trial(seed: int) -> list[str]:
    """Return the kinds of couplings that acted on a random program."""
    net, generator = Program(seed).eval().requires_grad_(False), torch.Generator().manual_seed(seed)
    x = torch.randn(3, 4, generator=generator).double()
    spec, state, plain = discover(net, x), state_of(net), net(x)
    acted: list[str] = []
    for group in spec.groups.values():
        change = coupling({slot.role for slot in group.slots}, group.size, generator)
        if change is None:
            continue
        moved = torch.func.functional_call(net, Relabelling(spec, {group.name: change}).apply(state), (x,))
        error = float((moved - plain).abs().max() / plain.abs().max())
        assert error <= 1e-8, f"seed {seed}: {change!r} on {group} of\n{spec}"
        acted.append(type(change).__name__)
    return acted


def test_what_roles_let_act_changes_nothing() -> None:
    acted = [kind for seed in range(8) for kind in trial(seed)]
    assert len(acted) > 8


@pytest.mark.slow
@pytest.mark.parametrize("block", range(10))
def test_what_roles_let_act_changes_nothing_in_many_programs(block: int) -> None:
    for seed in range(100 + 30 * block, 130 + 30 * block):
        trial(seed)
