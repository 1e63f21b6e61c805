"""Slots say whether they hold, read or scale their units: by hand for many networks, and by what then may act."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from symmetry_helpers import Net, normal, seeded
from torch import Tensor, nn
from torch.nn.utils import weight_norm as old_weight_norm
from torch.nn.utils.parametrizations import weight_norm

from isthmus.couplings import Coupling, Linear, Monomial, Rotation
from isthmus.errors import SymmetryError
from isthmus.states import state_of
from isthmus.symmetry import Relabelling, SymmetrySpec, discover
from isthmus.testing import (
    REFERENCE_NETWORKS,
    bert,
    gpt,
    llama,
    randomise_state,
    reference_inputs,
    reference_network,
    vit,
)


def roles(spec: SymmetrySpec) -> dict[str, str]:
    """Return the roles of all slots of groups of several units; slots of one axis that differ are listed."""
    found: dict[str, set[str]] = {}
    for group in spec.groups.values():
        for slot in group.slots if group.size > 1 else ():
            found.setdefault(f"{slot.tensor}[{slot.axis}]", set()).add(slot.role or "?")
    return {place: "/".join(sorted(words)) for place, words in found.items()}


def places(**words: str) -> dict[str, str]:
    """Return roles from lists of places."""
    return {place: word.strip("_") for word, listed in words.items() for place in listed.split()}


def made(build: Callable[[], nn.Module]) -> nn.Module:
    """Return a network in evaluation mode whose weights and statistics are drawn, in float64."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return randomise_state(build().double(), seeded()).eval()


def linear_coupling(size: int, generator: torch.Generator) -> Linear:
    """Return an invertible matrix far from a rotation, not badly conditioned."""
    left, right = (torch.linalg.qr(torch.randn(size, size, generator=generator).double()).Q for _ in "LR")
    return Linear(left @ torch.diag(torch.linspace(0.5, 2.0, size).double()) @ right)


def strongest(words: set[str], size: int, generator: torch.Generator) -> Coupling | None:
    """Return a coupling of the largest kind that slots of these roles take in a linear network; None: permutations."""
    if words <= {"holds", "reads"}:
        return linear_coupling(size, generator)
    if words <= {"holds", "reads", "both"}:
        return Rotation(torch.linalg.qr(torch.randn(size, size, generator=generator).double()).Q)
    if words <= {"holds", "reads", "scales"}:
        factors = torch.linspace(-2.0, 1.5, size).double() + 0.1
        return Monomial(torch.randperm(size, generator=generator), factors)
    return None


# Linear in their input, one for each way to write a layer. By hand: the role of every slot, all others are pinned.
LINEAR: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], dict[str, str]]] = {
    "linear": (
        lambda: nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 4), nn.Linear(4, 2)),
        (2, 3),
        places(holds="0.weight[0] 0.bias[0] 1.weight[0] 1.bias[0]", reads="1.weight[1] 2.weight[1]"),
    ),
    "one vector reads": (
        lambda: Net(lambda s, x: F.linear(F.linear(x, s.w), s.v), w=(5, 3), v=(5,)),
        (2, 3),
        places(holds="w[0]", reads="v[0]"),
    ),
    "x @ w @ v": (
        lambda: Net(lambda s, x: x @ s.w @ s.u @ s.v, w=(3, 5), u=(5, 4), v=(4,)),
        (2, 3),
        places(holds="w[1] u[1]", reads="u[0] v[0]"),
    ),
    "w @ x": (
        lambda: Net(lambda s, x: s.v @ (s.w @ x), w=(5, 3), v=(2, 5)),
        (3,),
        places(holds="w[0]", reads="v[1]"),
    ),
    "transposes": (
        lambda: Net(lambda s, x: (s.v.mT @ (s.w.t() @ x.T)).T, w=(3, 5), v=(5, 2)),
        (4, 3),
        places(holds="w[1]", reads="v[0]"),
    ),
    "vectors": (
        lambda: Net(lambda s, x: torch.outer(torch.mv(x, s.a), s.w) @ s.v, a=(3,), w=(5,), v=(5,)),
        (4, 3),
        places(holds="w[0]", reads="v[0]"),
    ),
    "addmm": (
        lambda: Net(
            lambda s, x: torch.addmm(s.c, torch.addmm(s.b, x, s.w), s.v), b=(5,), w=(3, 5), c=(2,), v=(5, 2)
        ),
        (4, 3),
        places(holds="w[1] b[0]", reads="v[0]"),
    ),
    "addmm of beta and alpha": (
        lambda: Net(
            lambda s, x: torch.addmm(s.b, x, s.w, beta=0.5, alpha=2.0) @ s.v, b=(5,), w=(3, 5), v=(5, 2)
        ),
        (4, 3),
        places(holds="w[1] b[0]", reads="v[0]"),
    ),
    "batched matrices": (
        lambda: Net(lambda s, x: torch.bmm(torch.bmm(x, s.w), s.v), w=(3, 4, 5), v=(3, 5, 2)),
        (3, 6, 4),
        places(holds="w[2]", reads="v[1]"),
    ),
    "batches of their own": (
        lambda: Net(
            lambda s, x: (torch.matmul(x, s.w) @ s.v).movedim(1, -1) @ s.u, w=(3, 4, 5), v=(3, 5, 2), u=(3,)
        ),
        (2, 1, 6, 4),
        {"w[2]": "holds", "v[1]": "reads", "w[0]": "holds", "v[0]": "scales", "u[0]": "reads"},
    ),
    "einsum": (
        lambda: Net(
            lambda s, x: torch.einsum("...h,h o->...o", torch.einsum("bi,hi->bh", x, s.w), s.v),
            w=(5, 3),
            v=(5, 2),
        ),
        (4, 3),
        places(holds="w[0]", reads="v[0]"),
    ),
    "einsum without an arrow": (
        lambda: Net(lambda s, x: torch.einsum("ai,ih", x, s.w) @ s.v, w=(3, 5), v=(5, 2)),
        (4, 3),
        places(holds="w[1]", reads="v[0]"),
    ),
    "einsum weights first": (
        lambda: Net(
            lambda s, x: torch.einsum("oh,...h->...o", s.v, torch.einsum("h...,...->h", s.w, x)),
            w=(5, 3),
            v=(2, 5),
        ),
        (3,),
        places(holds="w[0]", reads="v[1]"),
    ),
    "einsum of three": (
        lambda: Net(
            lambda s, x: torch.einsum("bi,ri,hr->bh", x, s.a, s.b) @ s.v, a=(4, 3), b=(5, 4), v=(5, 2)
        ),
        (6, 3),
        places(reads="a[0] v[0]", holds="b[0] b[1]"),
    ),
    "einsum by experts": (
        lambda: Net(
            lambda s, x: torch.einsum(
                "beh,eho->bo", torch.einsum("bei,eih->beh", torch.einsum("bi,ei->bei", x, s.e), s.w), s.v
            ),
            e=(4, 3),
            w=(4, 3, 5),
            v=(4, 5, 2),
        ),
        (6, 3),
        {"e[0]": "holds", "w[0]": "scales", "w[2]": "holds", "v[0]": "reads", "v[1]": "reads"},
    ),
    "heads": (
        lambda: Net(
            lambda s, x: F.linear(
                F.linear(x, s.w).unflatten(-1, (2, 3)).transpose(1, 2).transpose(1, 2).flatten(2), s.v
            ),
            w=(6, 3),
            v=(2, 6),
        ),
        (2, 4, 3),
        places(holds="w[0]", reads="v[1]"),
    ),
    "heads of a shaped weight": (
        lambda: Net(
            lambda s, x: torch.einsum(
                "hbd,hdo->bo", x @ s.w.view(2, 3, 4).transpose(1, 2).reshape(2, 4, 3), s.v.view(2, 3, 5)
            ),
            w=(6, 4),
            v=(6, 5),
        ),
        (7, 4),
        places(holds="w[0]", reads="v[0]"),
    ),
    "convolutions": (
        lambda: nn.Sequential(nn.Conv2d(3, 5, 3), nn.ConvTranspose2d(5, 4, 2), nn.Conv2d(4, 2, 1)),
        (2, 3, 5, 5),
        places(holds="0.weight[0] 0.bias[0] 1.weight[1] 1.bias[0]", reads="1.weight[0] 2.weight[1]"),
    ),
    "convolution, flattened": (
        lambda: nn.Sequential(nn.Conv1d(3, 5, 3), nn.AvgPool1d(2), nn.Flatten(), nn.Linear(10, 2)),
        (2, 3, 6),
        places(holds="0.weight[0] 0.bias[0]", reads="3.weight[1]"),
    ),
    "depthwise": (
        lambda: nn.Sequential(nn.Conv1d(3, 5, 1), nn.Conv1d(5, 5, 3, groups=5), nn.Conv1d(5, 2, 1)),
        (2, 3, 6),
        places(holds="0.weight[0] 0.bias[0] 1.bias[0]", scales="1.weight[0]", reads="2.weight[1]"),
    ),
    "grouped": (
        lambda: nn.Sequential(nn.Conv1d(3, 6, 1), nn.Conv1d(6, 4, 3, groups=2), nn.Conv1d(4, 2, 1)),
        (2, 3, 6),
        {
            **places(holds="0.weight[0] 0.bias[0] 1.bias[0]", reads="1.weight[1] 2.weight[1]"),
            "1.weight[0]": "holds/scales",
        },
    ),
    "grouped, transposed": (
        lambda: nn.Sequential(nn.Conv1d(3, 6, 1), nn.ConvTranspose1d(6, 4, 3, groups=2), nn.Conv1d(4, 2, 1)),
        (2, 3, 6),
        {
            **places(holds="0.weight[0] 0.bias[0] 1.weight[1] 1.bias[0]", reads="2.weight[1]"),
            "1.weight[0]": "reads/scales",
            "1.bias[0]": "holds",
        },
    ),
    "BatchNorm": (
        lambda: nn.Sequential(nn.Conv1d(3, 5, 3), nn.BatchNorm1d(5), nn.Conv1d(5, 2, 1)),
        (2, 3, 6),
        places(
            holds="0.weight[0] 0.bias[0] 1.bias[0] 1.running_mean[0]",
            scales="1.weight[0] 1.running_var[0]",
            reads="2.weight[1]",
        ),
    ),
    "gain": (
        lambda: Net(
            lambda s, x: F.linear(F.linear(x, s.w) * s.g / s.d, s.v), w=(5, 3), g=(5,), d=(5,), v=(2, 5)
        ),
        (4, 3),
        places(holds="w[0]", scales="g[0] d[0]", reads="v[1]"),
    ),
    "gain by einsum": (
        lambda: Net(lambda s, x: torch.einsum("bh,h->bh", x @ s.w, s.g) @ s.v, w=(3, 5), g=(5,), v=(5, 2)),
        (4, 3),
        places(holds="w[1]", scales="g[0]", reads="v[0]"),
    ),
    "curved gain": (
        lambda: Net(lambda s, x: (x @ s.w * (1 + s.g) * s.t.exp()) @ s.v, w=(3, 5), g=(5,), t=(5,), v=(5, 2)),
        (4, 3),
        places(holds="w[1]", scales="g[0] t[0]", reads="v[0]"),
    ),
    "a number times a vector": (
        lambda: Net(lambda s, x: (x.sum(1, keepdim=True) * s.w) @ s.v, w=(5,), v=(5, 2)),
        (4, 3),
        places(holds="w[0]", reads="v[0]"),
    ),
    "a number everywhere times a gain": (
        lambda: Net(lambda s, x: (x.sum(1, keepdim=True).expand(-1, 5) * s.w) @ s.v, w=(5,), v=(5, 2)),
        (4, 3),
        {"w[0]": "?", "v[0]": "reads"},
    ),
    "a number plus a vector": (
        lambda: Net(lambda s, x: (x[:, :1] + s.w) @ s.v, w=(5,), v=(5, 2)),
        (4, 3),
        {"w[0]": "?", "v[0]": "reads"},
    ),
    "a number everywhere is read": (
        lambda: Net(lambda s, x: x.sum(1, keepdim=True).expand(-1, 5) @ s.v, v=(5, 2)),
        (4, 3),
        {"v[0]": "?"},
    ),
    "a shifted weight": (
        lambda: Net(lambda s, x: x @ (s.w + 1.0) @ s.v, w=(3, 5), v=(5, 2)),
        (4, 3),
        {"w[1]": "?", "v[0]": "reads"},
    ),
    "a scaled weight": (
        lambda: Net(lambda s, x: x @ (s.w * 2.0 / s.k) @ s.v, w=(3, 5), k=(1,), v=(5, 2)),
        (4, 3),
        places(holds="w[1]", reads="v[0]"),
    ),
    "product of gain and weight": (
        lambda: Net(lambda s, x: F.linear(x, s.g[:, None] * s.w) @ s.v, g=(5,), w=(5, 3), v=(5, 2)),
        (4, 3),
        {"w[0]": "?", "g[0]": "?", "v[0]": "reads"},
    ),
    "summed weights": (
        lambda: Net(lambda s, x: x @ (s.w + s.u - s.b) @ s.v, w=(3, 5), u=(3, 5), b=(5,), v=(5, 2)),
        (4, 3),
        places(holds="w[1] u[1] b[0]", reads="v[0]"),
    ),
    "layers cut from one tensor": (
        lambda: Net(
            lambda s, x: F.linear(F.linear(F.linear(F.linear(x, s.u), s.w[0]), s.w[1]), s.v),
            u=(5, 3),
            w=(2, 5, 5),
            v=(2, 5),
        ),
        (4, 3),
        places(holds="u[0] w[1]", reads="w[2] v[1]"),
    ),
    "layers of a list": (
        lambda: Net(
            lambda s, x: sum(F.linear(F.linear(x, w), v) for w, v in zip(s.w, s.v.unbind(0), strict=True)),
            w=(2, 5, 3),
            v=(2, 2, 5),
        ),
        (4, 3),
        places(holds="w[1]", reads="v[2]"),
    ),
    "parts": (
        lambda: Net(
            lambda s, x: sum(
                F.linear(h, v) for h, v in zip(F.linear(x, s.w).chunk(2, -1), s.v.split(4, 1), strict=True)
            ),
            w=(8, 3),
            v=(2, 8),
        ),
        (4, 3),
        places(holds="w[0]", reads="v[1]"),
    ),
    "joined weights": (
        lambda: Net(
            lambda s, x: F.linear(F.linear(x, torch.cat([s.w, s.u])), torch.cat([s.v, s.t], 1)),
            w=(3, 4),
            u=(5, 4),
            v=(2, 3),
            t=(2, 5),
        ),
        (6, 4),
        places(holds="w[0] u[0]", reads="v[1] t[1]"),
    ),
    "stacked weights": (
        lambda: Net(
            lambda s, x: torch.einsum("bi,kih->bkh", x, torch.stack([s.w, s.u])).sum(1) @ s.v,
            w=(3, 5),
            u=(3, 5),
            v=(5, 2),
        ),
        (4, 3),
        places(holds="w[1] u[1]", reads="v[0]"),
    ),
    "chosen rows": (
        lambda: Net(lambda s, x: x @ s.w.index_select(0, torch.tensor([2, 0, 1])) @ s.v, w=(3, 5), v=(5, 2)),
        (4, 3),
        places(holds="w[1]", reads="v[0]"),
    ),
    "low rank": (
        lambda: Net(
            lambda s, x: F.linear(F.linear(x, s.w + 0.5 * s.b @ s.a), s.v),
            w=(5, 3),
            b=(5, 2),
            a=(2, 3),
            v=(2, 5),
        ),
        (4, 3),
        places(holds="w[0] b[0] a[0]", reads="b[1] v[1]"),
    ),
    "low rank, one factor read elsewhere too": (
        lambda: Net(
            lambda s, x: torch.cat([x @ (s.b @ s.a), x @ s.b @ s.c], 1), b=(3, 4), a=(4, 5), c=(4, 2)
        ),
        (6, 3),
        places(holds="b[1]", reads="a[0] c[0]"),
    ),
    "factors in a row": (
        lambda: Net(lambda s, x: x @ (s.a @ s.b @ s.c), a=(3, 4), b=(4, 5), c=(5, 2)),
        (6, 3),
        places(reads="a[1] b[1]", holds="b[0] c[0]"),
    ),
    "learned queries": (
        lambda: Net(lambda s, x: (s.q @ F.linear(x, s.w).mT).mT @ s.v, q=(4, 5), w=(5, 3), v=(4, 2)),
        (2, 6, 3),
        places(holds="q[0] w[0]", reads="q[1] v[0]"),
    ),
    "learned queries through a layer": (
        lambda: Net(lambda s, x: F.linear(s.q, s.u) @ F.linear(x, s.w).mT, q=(4, 3), u=(5, 3), w=(5, 3)),
        (2, 6, 3),
        {"q[1]": "holds", "u[1]": "reads", "u[0]": "both", "w[0]": "holds"},
    ),
    "learned tokens": (
        lambda: Net(
            lambda s, x: F.linear(torch.cat([s.t.expand(len(x), -1, -1), F.linear(x, s.w)], 1) + s.p, s.v),
            t=(1, 2, 5),
            p=(5, 5),
            w=(5, 3),
            v=(2, 5),
        ),
        (2, 3, 3),
        places(holds="t[2] p[1] w[0]", reads="v[1]"),
    ),
    "bilinear with itself": (
        lambda: Net(lambda s, x: s.b(F.linear(x, s.w), x[:, :2]), w=(5, 3), b=nn.Bilinear(5, 2, 3)),
        (4, 3),
        places(holds="w[0]", reads="b.weight[1]"),
    ),
    "tied": (
        lambda: Net(lambda s, x: F.linear(x, s.w) @ s.u @ s.w, w=(5, 3), u=(5, 5)),
        (4, 3),
        places(both="w[0]", reads="u[0]", holds="u[1]"),
    ),
    "one matrix twice": (
        lambda: Net(
            lambda s, x: F.linear(F.linear(F.linear(F.linear(x, s.w), s.u), s.u), s.v),
            w=(5, 3),
            u=(5, 5),
            v=(2, 5),
        ),
        (4, 3),
        places(holds="w[0] u[0]", reads="u[1] v[1]"),
    ),
    "a recurrence of projections": (
        lambda: Net(lambda s, x: F.linear(F.linear(x, s.w).flip(0).roll(1, 0), s.v), w=(5, 3), v=(2, 5)),
        (4, 3),
        places(holds="w[0]", reads="v[1]"),
    ),
}


class Together(nn.Module):
    """Networks beside each other, each with an input of its own: one trace for all."""

    def __init__(self, nets: Iterable[nn.Module]) -> None:
        super().__init__()
        self.nets = nn.ModuleList(nets)

    def forward(self, *inputs: Tensor) -> list[Tensor]:
        return [net(x) for net, x in zip(self.nets, inputs, strict=True)]


@cache
def linear_networks() -> tuple[Together, list[Tensor], SymmetrySpec]:
    net = Together([made(build) for build, _, _ in LINEAR.values()])
    inputs = [normal(*shape).double() for _, shape, _ in LINEAR.values()]
    return net, inputs, discover(net, inputs)


def by_roles(spec: SymmetrySpec) -> SymmetrySpec:
    """Return a spec whose slots say their roles alone, and not with which power factors act."""
    for group in spec.groups.values():
        spec = spec.with_group(replace(group, slots=tuple(replace(s, power=None) for s in group.slots)))
    return spec


@pytest.mark.parametrize("name", LINEAR)
def test_roles_by_hand_and_what_they_let_act_keeps_the_function(name: str) -> None:
    together, inputs, found_spec = linear_networks()
    spec = by_roles(found_spec)
    prefix = f"nets.{list(LINEAR).index(name)}."
    own = [g for g in spec.groups.values() if g.size > 1 and g.slots[0].tensor.startswith(prefix)]
    found = roles(spec.restrict([g.name for g in own]))
    assert {place.removeprefix(prefix): word for place, word in found.items()} == LINEAR[name][2]
    net, x = together.nets[list(LINEAR).index(name)], inputs[list(LINEAR).index(name)]
    state, plain = state_of(together), net(x)
    generator, acting = seeded(1), dict[str, Coupling]()

    def after(couplings: dict[str, Coupling]) -> Tensor:
        moved = Relabelling(spec, couplings).apply(state)
        parts = {n.removeprefix(prefix): t for n, t in moved.items() if n.startswith(prefix)}
        return torch.func.functional_call(net, parts, (x,))

    for group in own:
        coupling = strongest({slot.role for slot in group.slots}, group.size, generator)
        if coupling is not None:
            assert torch.allclose(after({group.name: coupling}), plain, rtol=1e-8, atol=1e-8), str(group)
            acting |= {} if group.within else {group.name: coupling}
    assert torch.allclose(after(acting), plain, rtol=1e-8, atol=1e-8)


def module_roles(net: nn.Module) -> dict[str, str]:
    """Return the roles that the modules of a network give their parameters, whichever axes move."""
    found: dict[str, str] = {}
    for name, m in net.named_modules():
        at = f"{name}." if name else ""
        if isinstance(m, nn.Linear):
            found |= {f"{at}weight[0]": "holds", f"{at}weight[1]": "reads", f"{at}bias[0]": "holds"}
        elif isinstance(m, nn.ConvTranspose2d):
            found |= {f"{at}weight[0]": "reads", f"{at}weight[1]": "holds", f"{at}bias[0]": "holds"}
        elif isinstance(m, nn.Conv2d):
            rows = "holds" if m.groups == 1 else "scales"
            found |= {f"{at}weight[0]": rows, f"{at}weight[1]": "reads", f"{at}bias[0]": "holds"}
        elif isinstance(m, nn.Embedding):
            found[f"{at}weight[1]"] = "holds"
        elif any(word in type(m).__name__ for word in ("BatchNorm", "GroupNorm", "LayerNorm", "RMSNorm")):
            found |= {f"{at}weight[0]": "scales", f"{at}running_var[0]": "scales"}
            found |= {f"{at}bias[0]": "holds", f"{at}running_mean[0]": "holds"}
    return found


TOKENS = torch.zeros(2, 5, dtype=torch.int64)
WHOLE: dict[str, tuple[Callable[[], nn.Module], Callable[[], tuple[Any, ...]], dict[str, str]]] = {
    **{
        name: (lambda name=name: reference_network(name), lambda name=name: reference_inputs(name), {})
        for name in REFERENCE_NETWORKS
    },
    "gpt": (
        lambda: gpt(11, 8, 1, 2, 5),
        lambda: (TOKENS,),
        places(both="tokens.weight[1] head.weight[1]"),
    ),
    "llama": (lambda: llama(11, 8, 1, 4, kv_heads=2, hidden=6), lambda: (TOKENS,), {}),
    "bert": (lambda: bert(11, width=8, depth=1, heads=2), lambda: (TOKENS, TOKENS, TOKENS + 1), {}),
    "vit": (
        lambda: vit(width=8, depth=1, heads=2),
        lambda: (torch.zeros(2, 1, 28, 28),),
        places(holds="token[2] positions[2]"),
    ),
}


MANY = ("shufflenet", "resnet20", "resnet20_zero_pad", "densenet", "vgg16", "unet")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name in MANY else []) for name in WHOLE]
)
def test_every_slot_of_a_known_network_has_the_role_its_module_gives_it(name: str) -> None:
    build, inputs, own = WHOLE[name]
    net = build().eval()
    expected = module_roles(net) | own
    found = roles(discover(net, inputs()))
    assert found == {place: expected[place] for place in found}
    assert len(found) > 5


# Not linear, or written with operators that say nothing: by hand.
OTHERS: dict[str, tuple[Callable[[], nn.Module], Callable[[], tuple[Any, ...]], dict[str, str]]] = {}


def other(name: str, build: Callable[[], nn.Module], *inputs: Tensor, **words: str) -> None:
    OTHERS[name] = (build, lambda: inputs, places(**words))


class Recurrent(nn.Module):
    def __init__(self, kind: str, **settings: Any) -> None:
        super().__init__()
        self.cells = getattr(nn, kind)(3, 4, num_layers=2, batch_first=True, **settings)
        size = 2 * 4 if settings.get("bidirectional") else settings.get("proj_size") or 4
        self.first = nn.Parameter(torch.randn(2, 1, 4))
        self.out = nn.Linear(size, 2)
        self.given = kind != "LSTM" and not settings

    def forward(self, x: Tensor) -> Tensor:
        state = (self.first.expand(-1, len(x), -1).contiguous(),) if self.given else ()
        return self.out(self.cells(x, *state)[0])


SEQUENCE = normal(2, 5, 3)
_CELLS = "cells.weight_ih_l0[0] cells.weight_hh_l0[0] cells.bias_ih_l0[0] cells.bias_hh_l0[0] "
_CELLS += _CELLS.replace("l0", "l1")
_READ = "cells.weight_hh_l0[1] cells.weight_ih_l1[1] cells.weight_hh_l1[1] out.weight[1]"
other("LSTM", lambda: Recurrent("LSTM"), SEQUENCE, holds=_CELLS, reads=_READ)
other("GRU with a first state", lambda: Recurrent("GRU"), SEQUENCE, holds=_CELLS + "first[2]", reads=_READ)
other("Elman with a first state", lambda: Recurrent("RNN"), SEQUENCE, holds=_CELLS + "first[2]", reads=_READ)
VECTORS = normal(4, 3)
other(
    "weight normalisation by a hook",
    lambda: nn.Sequential(old_weight_norm(nn.Linear(3, 5)), nn.ReLU(), old_weight_norm(nn.Linear(5, 2))),
    VECTORS,
    holds="0.bias[0]",
    **{"?": "0.weight_g[0] 0.weight_v[0] 2.weight_v[1]"},
)
other(
    "weight normalisation by a parametrisation",
    lambda: nn.Sequential(weight_norm(nn.Linear(3, 5)), nn.ReLU(), weight_norm(nn.Linear(5, 2))),
    VECTORS,
    holds="0.bias[0]",
    **{
        "?": "0.parametrizations.weight.original0[0] 0.parametrizations.weight.original1[0] "
        "2.parametrizations.weight.original1[1]"
    },
)
other(
    "weight normalisation by hand",
    lambda: Net(
        lambda s, x: F.linear(F.linear(x, s.g * s.w / s.w.norm(dim=1, keepdim=True)).relu(), s.v),
        g=(5, 1),
        w=(5, 3),
        v=(2, 5),
    ),
    VECTORS,
    reads="v[1]",
    **{"?": "g[0] w[0]"},
)
other(
    "a table read by its transpose",
    lambda: Net(lambda s, x: F.linear(s.e(x), s.u).relu() @ s.e.weight.T, e=nn.Embedding(7, 5), u=(5, 5)),
    TOKENS,
    both="e.weight[1]",
    reads="u[1]",
    holds="u[0]",
)
other(
    "positions that are read",
    lambda: Net(lambda s, x: F.linear(x, s.w) @ s.e(torch.arange(4)).T, w=(5, 3), e=nn.Embedding(4, 5)),
    VECTORS,
    holds="w[0]",
    reads="e.weight[1]",
)
other(
    "weights through functions, and operators that say nothing",
    lambda: Net(
        lambda s, x: (
            F.linear(F.linear(x, s.w.tanh()), s.u.softmax(0)).cumsum(0).relu() @ s.v
            + F.linear(x, s.t * torch.arange(15.0).reshape(5, 3)) @ s.k.clamp(min=0)
        ),
        w=(6, 3),
        u=(5, 6),
        v=(5, 2),
        t=(5, 3),
        k=(5, 2),
    ),
    VECTORS,
    **{"?": "w[0] u[0] u[1] v[0]"},
)
other(
    "rounded weights",
    lambda: Net(
        lambda s, x: F.linear(F.linear(x, torch.div(s.w, 0.5, rounding_mode="floor")), s.v),
        w=(5, 3),
        v=(2, 5),
    ),
    VECTORS,
    reads="v[1]",
    **{"?": "w[0]"},
)
other(
    "gains, slopes and norms",
    lambda: Net(
        lambda s, x: s.o(s.n(s.l(x)) + s.g * s.p(s.m(s.r(s.l(x))))),
        l=nn.Linear(3, 6),
        n=nn.LayerNorm(6),
        r=nn.RMSNorm(6),
        m=nn.Linear(6, 6),
        p=nn.PReLU(6),
        g=(6,),
        o=nn.Linear(6, 2),
    ),
    VECTORS,
    holds="l.weight[0] l.bias[0] n.bias[0] m.weight[0] m.bias[0]",
    scales="n.weight[0] r.weight[0] p.weight[0] g[0]",
    reads="m.weight[1] o.weight[1]",
)
other(
    "attention over learned keys",
    lambda: Net(
        lambda s, x: F.scaled_dot_product_attention(F.linear(x, s.q), s.k[None], s.u[None]) @ s.o,
        q=(4, 3),
        k=(6, 4),
        u=(6, 5),
        o=(5, 2),
    ),
    SEQUENCE,
    holds="q[0] u[1]",
    reads="k[1] o[0]",
    **{"?": "k[0] u[0]"},
)
other(
    "instance norm and a gate",
    lambda: nn.Sequential(
        nn.Conv1d(5, 6, 1), nn.InstanceNorm1d(6, affine=True), nn.GLU(1), nn.Conv1d(3, 2, 1)
    ),
    SEQUENCE.new_zeros(2, 5, 4),
    holds="0.weight[0] 0.bias[0] 1.bias[0]",
    scales="1.weight[0]",
    **{"?": "3.weight[1]"},
)


@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated")
@pytest.mark.parametrize("name", OTHERS)
def test_roles_by_hand(name: str) -> None:
    build, inputs, expected = OTHERS[name]
    assert roles(discover(build().eval(), inputs())) == expected


def test_a_weight_of_a_trillion_entries_is_never_made() -> None:
    with torch.device("meta"):
        net = Net(
            lambda s, x: F.linear(
                F.linear(x, s.w).relu(), s.u.view(10, 10**5, 10**6).flatten(0, 1) + s.b @ s.a
            ),
            w=(10**6, 3),
            u=(10**6, 10**6),
            b=(10**6, 2),
            a=(2, 10**6),
        )
        spec = discover(net.eval(), torch.zeros(1, 3))
    assert roles(spec) == places(holds="w[0] a[0]", reads="u[1] a[1] b[1]")


def test_what_may_act_on_slots_is_said() -> None:
    gained = LINEAR["gain"][0]().eval()
    spec = by_roles(discover(gained, VECTORS))
    turn = Rotation(torch.linalg.qr(normal(5, 5).double()).Q)
    with pytest.raises(
        SymmetryError, match=r"slot g\[0\] multiplies one by one its units, so only a Permutation or a Mon"
    ):
        Relabelling(spec, {"w": turn}).apply(state_of(gained))
    tied = LINEAR["tied"][0]().eval()
    spec = by_roles(discover(tied, VECTORS))
    with pytest.raises(
        SymmetryError, match=r"slot w\[0\] holds and reads its units, so only a Permutation or a Rotation"
    ):
        Relabelling(spec, {"w": linear_coupling(5, seeded())}).apply(state_of(tied))
    curved = LINEAR["product of gain and weight"][0]().eval()
    spec = by_roles(discover(curved, VECTORS))
    with pytest.raises(SymmetryError, match="does not say whether it holds or reads"):
        Relabelling(spec, {name: linear_coupling(5, seeded()) for name in spec.groups}).apply(
            state_of(curved)
        )


def test_an_empty_tensor_among_those_joined_says_nothing() -> None:
    """A cache that holds nothing yet is a tensor of shape (0,), which ``cat`` leaves out."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(torch.cat([torch.zeros(0), self.a(x)], dim=-1))

    spec = discover(Net().eval(), torch.randn(2, 3))
    roles = {str(s): s.role for group in spec.groups.values() for s in group.slots}
    assert roles == {"a.weight[0]": "holds", "a.bias[0]": "holds", "b.weight[1]": "reads"}
