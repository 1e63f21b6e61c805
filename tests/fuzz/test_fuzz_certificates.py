"""Random programs under a certificate: the bound holds for every example, or the operator is refused by name.

All axes have equal lengths, the number of examples too, so that no shape gives away which axis is which. Half of the
operators below mix examples, in one of their settings at least.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from isthmus.errors import ModelError
from isthmus.theory import certify, certify_weights_only

_LENGTH = 4
Pick = Callable[..., Any]


class Program(nn.Module):
    """A list of steps, each a function of the network and the value so far, and the layers they use."""

    def __init__(self, steps: list[Callable[[Any, Tensor], Tensor]], layers: dict[str, nn.Module]) -> None:
        super().__init__()
        self.steps = steps
        self.layers = nn.ModuleDict(layers)

    def forward(self, x: Tensor) -> Tensor:
        for step in self.steps:
            x = step(self, x)
        return x


def steps_for(
    rank: int, pick: Pick, name: str, layers: dict[str, nn.Module]
) -> list[Callable[[Any, Tensor], Tensor]]:
    """Return steps that keep a value of ``rank`` axes of length 4 at that shape; ``name`` is free for a layer."""
    n = _LENGTH
    # mostly other axes than that of the examples, or hardly any program would be certified
    axes = [*range(rank), *range(1, rank), *range(1, rank)]
    axis, other = pick(*axes), pick(*axes)
    table = torch.randn(n, n, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    order = list(range(rank))
    order[0], order[-1] = (order[-1], order[0]) if pick(True, False) else (0, rank - 1)

    def layer(kind: Callable[[], nn.Module]) -> Callable[[Any, Tensor], Tensor]:
        layers[name] = kind()
        return lambda s, x: s.layers[name](x)

    def matrix() -> Callable[[Any, Tensor], Tensor]:
        layers[name] = nn.Linear(n, n)
        return lambda s, x: functional.linear(x.transpose(axis, -1), s.layers[name].weight).transpose(
            axis, -1
        )

    chosen = pick(
        lambda: layer(lambda: nn.Linear(n, n)),
        lambda: layer(lambda: nn.Linear(n, n)),
        lambda: layer(lambda: nn.Linear(n, n, bias=False)),
        matrix,
        lambda: lambda s, x: x.relu(),
        lambda: lambda s, x: x.tanh(),
        lambda: lambda s, x: functional.gelu(x),
        lambda: lambda s, x: functional.leaky_relu(x, 0.3),
        lambda: lambda s, x: x.flip(axis),
        lambda: lambda s, x: x.roll(1, axis),
        lambda: lambda s, x: x.cumsum(axis),
        lambda: lambda s, x: x.sort(axis).values,
        lambda: lambda s, x: functional.pad(x, [0] * (2 * (rank - 1 - axis)) + [-1, 1]),
        lambda: lambda s, x: functional.pad(x, [0] * (2 * (rank - 1 - axis)) + [1, -1], value=2.0),
        lambda: lambda s, x: functional.pad(x, [0] * (2 * (rank - 1 - axis)) + [0, 2]).narrow(axis, 1, n),
        lambda: lambda s, x: torch.cat([x, x.narrow(axis, 0, 1)], axis).narrow(axis, 1, n),
        lambda: lambda s, x: torch.stack([x, x.tanh()], axis).mean(axis),
        lambda: lambda s, x: torch.cat(x.chunk(2, axis)[::-1], axis),
        lambda: lambda s, x: torch.cat(x.unbind(axis)[::-1], 0).reshape(x.shape),
        lambda: lambda s, x: x + x.mean(axis, keepdim=True),
        lambda: lambda s, x: x.mean(axis, keepdim=True).expand(x.shape),
        lambda: lambda s, x: x + x.sum(axis, keepdim=True).expand(x.shape),
        lambda: lambda s, x: x.transpose(axis, other),
        lambda: lambda s, x: x.permute(order),
        lambda: lambda s, x: x.movedim(axis, other),
        lambda: lambda s, x: x.reshape(-1, n).reshape(x.shape),
        lambda: lambda s, x: x.reshape(2, -1).t().reshape(x.shape),
        lambda: lambda s, x: x.index_select(axis, torch.tensor([1, 0, 3, 2])),
        lambda: lambda s, x: x * 0.5,
        lambda: lambda s, x: x / 3.0 - 1.0,
        lambda: lambda s, x: torch.add(x.relu(), x.tanh(), alpha=-2.0),
        lambda: lambda s, x: x + table,
        lambda: lambda s, x: x * table,
        lambda: lambda s, x: 1.0 - x,
        lambda: lambda s, x: torch.where(table > 0, x, 0.0),
        lambda: lambda s, x: x.clamp(-0.5, 0.5),
        lambda: lambda s, x: x.float().double(),
        lambda: lambda s, x: torch.einsum("...ij,kj->...ik", x, table) if rank > 1 else x,
        lambda: lambda s, x: x @ x if rank > 1 else x,
        lambda: lambda s, x: x.softmax(axis),
        lambda: lambda s, x: x.clone().mul_(2.0).add_(1.0),
        lambda: lambda s, x: x.pow(2) * 0.1,
    )  # fmt: skip
    found = [chosen()]
    if rank == 3 and pick(True, False):
        found = [spatial_1d(pick, layer)]
    if rank == 4 and pick(True, True, False):
        found = [spatial_2d(pick, layer)]
    return found


def spatial_1d(pick: Pick, layer: Any) -> Callable[[Any, Tensor], Tensor]:
    n = _LENGTH
    return pick(
        lambda: layer(lambda: nn.Conv1d(n, n, 3, padding=1)),
        lambda: layer(lambda: nn.Conv1d(n, n, 3, padding=1, padding_mode="circular")),
        lambda: lambda s, x: functional.max_pool1d(x, 3, 1, 1),
        lambda: lambda s, x: functional.interpolate(x, scale_factor=1.2, mode="nearest")[..., :n],
        # a convolution of one image whose channels lie on axis 0
        lambda: layer(lambda: nn.Conv2d(n, n, 3, padding=1)),
        lambda: lambda s, x: functional.avg_pool2d(x, 3, 1, 1),
        lambda: lambda s, x: functional.pixel_shuffle(x, 2).reshape(x.shape),
    )()


def spatial_2d(pick: Pick, layer: Any) -> Callable[[Any, Tensor], Tensor]:
    n = _LENGTH
    factor, counted = pick(1.05, 1.2, 1.3, 1.45, 1.7, 2.9), pick(True, True, False)
    padding, dilation, groups, mode = (
        pick(1, 2),
        pick(1, 2),
        pick(1, 2, 4),
        pick("zeros", "reflect", "replicate"),
    )
    return pick(
        lambda: layer(lambda: nn.Conv2d(n, n, 3, padding=1)),
        lambda: layer(lambda: nn.Conv2d(n, n, 3, padding=padding, dilation=dilation, groups=groups)),
        lambda: layer(lambda: nn.Conv2d(n, n, 3, padding="same", padding_mode=mode)),
        lambda: layer(lambda: nn.ConvTranspose2d(n, n, 3, padding=1)),
        lambda: layer(lambda: nn.Conv3d(n, n, 3, padding=1)),
        lambda: lambda s, x: functional.max_pool2d(x, 3, 1, 1),
        lambda: lambda s, x: functional.max_pool2d(x, 2, 1, 1, dilation=2, ceil_mode=True),
        lambda: lambda s, x: functional.avg_pool2d(x, 3, 1, 1, count_include_pad=counted),
        lambda: (
            lambda s, x: (
                functional.adaptive_avg_pool2d(x, 2).repeat_interleave(2, -1).repeat_interleave(2, -2)
            )
        ),
        lambda: lambda s, x: functional.adaptive_avg_pool2d(x, (n, n)),
        lambda: lambda s, x: functional.interpolate(x, scale_factor=factor, mode="nearest")[..., :n, :n],
        lambda: (
            lambda s, x: functional.interpolate(x, scale_factor=factor, mode="nearest-exact")[..., :n, :n]
        ),
        lambda: lambda s, x: functional.interpolate(x, scale_factor=factor, mode="bilinear")[..., :n, :n],
        lambda: lambda s, x: functional.interpolate(x, size=(6, 5), mode="nearest")[..., :n, :n],
        lambda: lambda s, x: functional.pixel_unshuffle(functional.pixel_shuffle(x, 2), 2),
        lambda: lambda s, x: functional.channel_shuffle(x, 2),
        lambda: layer(lambda: nn.PReLU(n)),
    )()


def program(seed: int) -> tuple[list[nn.Module], Tensor, int]:
    """Return two networks of one random program, inputs, and a number of segments."""
    g = torch.Generator().manual_seed(seed)

    def pick(*options: Any) -> Any:
        return options[int(torch.randint(len(options), (1,), generator=g))]

    rank = pick(1, 2, 2, 3, 3, 4, 4, 4)
    layers: dict[str, nn.Module] = {}
    steps: list[Callable[[Any, Tensor], Tensor]] = []
    torch.manual_seed(seed)
    layers["first"] = nn.Linear(_LENGTH, _LENGTH)
    steps.append(lambda s, x: s.layers["first"](x))
    for k in range(pick(1, 1, 2, 3)):
        steps += steps_for(rank, pick, f"l{k}", layers)
        if pick(True, False):
            steps.append(lambda s, x: x.relu())
    layers["last"] = nn.Linear(_LENGTH, _LENGTH)
    steps.append(lambda s, x: s.layers["last"](x))
    model = Program(steps, layers).double().eval()
    networks: list[nn.Module] = []
    for k in range(2):
        torch.manual_seed(1000 * seed + k)
        networks.append(copy.deepcopy(model))
        networks[-1].load_state_dict(
            {key: 0.7 * torch.randn_like(v) for key, v in model.state_dict().items()}
        )
    x = torch.randn(*[_LENGTH] * rank, generator=g, dtype=torch.float64) * pick(0.1, 1.0, 5.0)
    return networks, x, pick(1, 2, 3)


def sup_errors(networks: list[nn.Module], x: Tensor, points: int = 17) -> tuple[Tensor, float]:
    """Return the largest error over the grid, of every block of axis 0 and of their mean."""
    a, b = (m.state_dict() for m in networks)
    worst, mean = torch.zeros(len(x), dtype=torch.float64), 0.0
    with torch.no_grad():
        ends = [m(x) for m in networks]
        for t in torch.linspace(0, 1, points, dtype=torch.float64).tolist():
            state = {k: (1 - t) * v + t * b[k] for k, v in a.items()}
            found = torch.func.functional_call(networks[0], state, (x,))
            error = found - ((1 - t) * ends[0] + t * ends[1])
            errors = error.reshape(len(x), -1).norm(dim=1)
            worst, mean = torch.maximum(worst, errors), max(mean, float(errors.mean()))
    return worst, mean


def trial(seed: int) -> bool:
    """Hold one certificate to the grid; return whether there was one."""
    networks, x, segments = program(seed)
    try:
        with torch.no_grad():
            networks[0](x)
    except (RuntimeError, IndexError, ValueError):
        return False  # no program: the shapes do not fit
    try:
        found = certify(networks[0], networks[1], [x], segments=segments)
    except ModelError as error:
        assert "out of scope" in str(error) or "torch.export" in str(error)  # noqa: PT017
        return False
    worst, mean = sup_errors(networks, x)
    assert bool((worst <= found.per_example).all())
    assert mean <= found.lmc_error * (1 + 1e-12)
    return True


def test_random_programs_are_bounded_or_refused():
    assert sum(trial(seed) for seed in range(12)) >= 2


@pytest.mark.slow
@pytest.mark.parametrize(
    "block", [pytest.param(b, marks=pytest.mark.huge) if b >= 25 else b for b in range(50)]
)
def test_many_random_programs_are_bounded_or_refused(block):
    for seed in range(1000 + 40 * block, 1040 + 40 * block):
        trial(seed)


@pytest.mark.parametrize("scale", [1e-300, 1e-8, 1.0, 1e13, 1e140])
def test_a_weights_only_bound_covers_rounding(scale):
    """Biases of any size: what float64 leaves of the outputs is in the bound."""
    for seed in range(2):
        torch.manual_seed(seed)
        make = lambda: nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3))  # noqa: E731
        networks = [make().double().eval() for _ in range(2)]
        with torch.no_grad():
            for model in networks[: 1 + seed % 2]:
                model[0].bias.fill_(scale)
                model[2].weight.mul_(1 / scale if 1e-100 < scale < 1e100 else 1.0)
        if seed % 2 == 0:
            networks[1] = networks[0]
        x = torch.randn(7, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        found = certify_weights_only(networks[0], networks[1], [x])
        worst, _ = sup_errors(networks, x, 33)
        assert float(worst.square().mean().sqrt()) <= found.lmc_error
        if scale <= 1e13:
            assert math.isfinite(found.lmc_error)
