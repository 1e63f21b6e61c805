"""Gains are gradients of what objectives compare: every objective on every reference network."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import copy
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from isthmus.batches import Batch
from isthmus.couplings import random_permutation
from isthmus.matching import (
    METHODS,
    Cluster,
    Gain,
    Objective,
    Problem,
    TermObjective,
    covariance_objective,
    weight_objective,
)
from isthmus.symmetry import Couplings
from isthmus.testing import (
    REFERENCE_NETWORKS,
    check_gain_law,
    gpt,
    randomise_state,
    reference_inputs,
    reference_network,
)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


NETWORKS: dict[str, tuple[Callable[[int], nn.Module], Callable[[], Tensor]]] = {
    **{
        name: (
            lambda seed, name=name: reference_network(name, seed=seed),
            lambda name=name: reference_inputs(name, 4, generator=generator(7))[0],
        )
        for name in REFERENCE_NETWORKS
    },
    "gpt": (
        lambda seed: gpt(vocabulary=11, width=8, depth=1, heads=2, context=5),
        lambda: torch.randint(0, 11, (6, 5), generator=generator(7)),
    ),
}


def drawn(build: Callable[[int], nn.Module], seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return randomise_state(build(seed), generator(seed)).eval()


@cache
def objectives(network: str) -> dict[str, Objective]:
    build, inputs = NETWORKS[network]
    problem = Problem(drawn(build, 0), drawn(build, 1), batches=[Batch((inputs(),))])
    return {
        name: method.objective(problem, generator())
        for name, method in METHODS.items()
        if name in METHODS.usual
    }


MANY = ("vgg16", "vgg16_bn", "resnet20_zero_pad", "shufflenet", "densenet", "unet")
SIZES = [pytest.param(name, marks=[pytest.mark.slow] if name in MANY else []) for name in NETWORKS]


@pytest.mark.parametrize("network", SIZES)
@pytest.mark.parametrize("objective", METHODS.usual)
def test_gains_are_gradients(network: str, objective: str) -> None:
    check_gain_law(objectives(network)[objective])


class Tied(nn.Module):
    """Every matrix is used both ways: its rows and its columns are outputs of a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(4, 6), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = self.two(self.one(x).tanh()).tanh()
        return (h @ self.two.weight).tanh() @ self.one.weight


class Experts(nn.Module):
    """Hidden units inside each of three experts, experts inside tensors of all."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.router, self.out = nn.Linear(4, 6), nn.Linear(6, 3), nn.Linear(6, 2)
        self.up, self.down = nn.Parameter(torch.randn(3, 6, 5)), nn.Parameter(torch.randn(3, 5, 6))

    def forward(self, x: Tensor) -> Tensor:
        h = self.enter(x)
        made = torch.einsum("beh,eho->beo", torch.einsum("bi,eih->beh", h, self.up).relu(), self.down)
        return self.out(h + (made * self.router(h).softmax(-1)[..., None]).sum(1))


class Recurrent(nn.Module):
    """One matrix whose rows and columns move together."""

    def __init__(self) -> None:
        super().__init__()
        self.read, self.step, self.write = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.read(x).relu()
        return self.write((h + self.step((h + self.step(h)).relu())).relu())


class Grouped(nn.Module):
    """Channels inside each of two groups, on both axes of one filter."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.filter, self.out = (
            nn.Conv1d(3, 6, 1),
            nn.Conv1d(6, 8, 3, groups=2),
            nn.Conv1d(8, 2, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.filter(self.enter(x).relu()).relu())


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator(3))


OWN: dict[str, tuple[Callable[[int], nn.Module], Callable[[], Tensor]]] = {
    "tied": (lambda seed: Tied(), lambda: normal(30, 4)),
    "experts": (lambda seed: Experts(), lambda: normal(30, 4)),
    "recurrent": (lambda seed: Recurrent(), lambda: normal(30, 4)),
}


@pytest.mark.parametrize("network", OWN)
def test_gains_are_gradients_where_axes_are_hard_to_tell_apart(network: str) -> None:
    NETWORKS.setdefault(network, OWN[network])
    for objective in objectives(network).values():
        check_gain_law(objective)


def test_blocks_whose_members_lie_on_two_axes_count_a_filter_on_each() -> None:
    """A known departure: the weights objective counts a grouped filter twice for its blocks, once for their members."""
    NETWORKS.setdefault("grouped", (lambda seed: Grouped(), lambda: normal(5, 3, 9)))
    found = objectives("grouped")
    for name in ("weights-incoming", "covariance", "activations", "correlation"):
        check_gain_law(found[name])
    with pytest.raises(AssertionError, match="the gains of 'enter' differ"):
        check_gain_law(found["weights"])


class Turned(nn.Module):
    """A grouped transposed convolution: its inputs and its outputs lie inside blocks of one axis of the filter."""

    def __init__(self, dimensions: int = 2, kernel: int = 2, bias: bool = True, norm: bool = False) -> None:
        super().__init__()
        layer, turned = (getattr(nn, f"{name}{dimensions}d") for name in ("Conv", "ConvTranspose"))
        self.enter, self.out = layer(2, 4, 1), layer(6, 2, 1)
        self.filter = turned(4, 6, kernel, groups=2, bias=bias)
        self.norm = nn.BatchNorm2d(6) if norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.norm(self.filter(self.enter(x).relu())).relu())


class Straightened(Turned):
    """What the grouped transposed convolution computes, with a kernel of one, as a grouped convolution."""

    def __init__(self) -> None:
        super().__init__(kernel=1)
        self.filter = nn.Conv2d(4, 6, 1, groups=2)


class Deep(nn.Module):
    """Experts of two layers: members of each expert on both axes of the second layer's weights."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.router, self.out = nn.Linear(4, 6), nn.Linear(6, 3), nn.Linear(6, 2)
        self.up, self.down = nn.Parameter(torch.randn(3, 6, 5)), nn.Parameter(torch.randn(3, 4, 6))
        self.middle = nn.Parameter(torch.randn(3, 5, 4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.enter(x)
        first = torch.einsum("bi,eih->beh", h, self.up).relu()
        made = torch.einsum(
            "beo,eoi->bei", torch.einsum("beh,eho->beo", first, self.middle).relu(), self.down
        )
        return self.out(h + (made * self.router(h).softmax(-1)[..., None]).sum(1))


ON_TWO_AXES: dict[str, tuple[Callable[[int], nn.Module], Callable[[], Tensor]]] = {
    "turned": (lambda seed: Turned(), lambda: normal(3, 2, 4, 4)),
    "turned, norm": (lambda seed: Turned(norm=True), lambda: normal(3, 2, 4, 4)),
    "turned, 1 axis, no bias": (lambda seed: Turned(1, 3, bias=False), lambda: normal(3, 2, 5)),
    "deep experts": (lambda seed: Deep(), lambda: normal(30, 4)),
}


@pytest.mark.parametrize("network", ON_TWO_AXES)
def test_a_filter_that_no_layer_reads_counts_each_slot_once(network: str) -> None:
    NETWORKS.setdefault(network, ON_TWO_AXES[network])
    found = objectives(network)
    for name in ("weights-incoming", "covariance"):
        check_gain_law(found[name])


def test_a_grouped_transposed_convolution_is_matched_as_the_convolution_that_it_is() -> None:
    """With a kernel of one the two filters hold the same numbers, ``w[i, o]`` here and ``w[o, i]`` there."""
    turned = [drawn(lambda seed: Turned(kernel=1), k) for k in (0, 1)]
    straight = [drawn(lambda seed: Straightened(), k) for k in (0, 1)]
    for one, other in zip(turned, straight, strict=True):
        state = one.state_dict()
        blocks = state["filter.weight"].reshape(2, 2, 3)
        state["filter.weight"] = blocks.transpose(1, 2).reshape(6, 2, 1, 1)
        other.load_state_dict(state)
    x = normal(3, 2, 4, 4)
    torch.testing.assert_close(turned[0](x), straight[0](x))
    one, other = (
        METHODS["weights-incoming"].objective(Problem(*pair, batches=[Batch((x,))]), generator())
        for pair in (turned, straight)
    )
    assert one.structure.sizes == other.structure.sizes
    at = {name: random_permutation(size, generator(5)) for name, size in one.structure.sizes.items()}
    assert one.value(at) == pytest.approx(other.value(at), rel=1e-12)
    for cluster in one.structure.clusters:
        for group in cluster:
            sums = [
                sum(g.reduced(group) for g in part.gains(cluster, at) if group in g.members)
                for part in (one, other)
            ]
            torch.testing.assert_close(*sums, rtol=1e-12, atol=1e-12)


class _Broken:
    """An objective whose gains are not its own."""

    def __init__(self, inner: Any, change: Callable[[Any, Cluster, Couplings], Sequence[Gain]]) -> None:
        self.inner, self.change, self.structure = inner, change, inner.structure
        self.value, self.cost, self.compared = inner.value, inner.cost, inner.compared

    def gains(self, cluster: Cluster, at: Couplings, *, all_terms: bool = True) -> Sequence[Gain]:
        return self.change(self.inner, cluster, at)


def test_broken_gains_are_noticed() -> None:
    objective = objectives("mlp")["weights"]

    def where_b_was(inner: Any, cluster: Cluster, at: Couplings) -> Sequence[Gain]:
        return inner.gains(cluster, {n: c for n, c in at.items() if n not in cluster})

    def transposed(inner: Any, cluster: Cluster, at: Couplings) -> Sequence[Gain]:
        return [Gain(g.matrix.T, g.members) for g in inner.gains(cluster, at)]

    def halved(inner: Any, cluster: Cluster, at: Couplings) -> Sequence[Gain]:
        return [Gain(g.matrix / 2, g.members) for g in inner.gains(cluster, at)]

    for change in (where_b_was, transposed, halved):
        with pytest.raises(AssertionError, match=r"gains of 'layers.\d' differ from the gradient"):
            check_gain_law(_Broken(objective, change))


def test_a_forgotten_term_and_terms_with_a_scale_are_noticed() -> None:
    build, inputs = NETWORKS["mlp"]
    problem = Problem(drawn(build, 0), drawn(build, 1), batches=[Batch((inputs(),))])
    whole = weight_objective(problem.pair)
    check_gain_law(whole)
    terms = [t for c in whole.structure.clusters for t in whole.terms(c)]
    first = terms.index(next(t for t in terms if len(t.inner_product.groups) > 1))
    with pytest.raises(AssertionError, match="differ from the gradient"):
        check_gain_law(TermObjective(whole.structure, terms[:first] + terms[first + 1 :]))
    with pytest.raises(AssertionError, match="differ from the gradient"):
        check_gain_law(
            covariance_objective(problem.pair, problem.input_statistics(generator()), tie_outgoing=True)
        )


def test_broken_moments_are_noticed() -> None:
    objective: Any = objectives("mlp")["activations"]
    check_gain_law(objective)
    broken = copy(objective)
    broken.gains = lambda cluster, at, all_terms=True: objective.gains(cluster, {})
    with pytest.raises(AssertionError, match=r"moving 'layers.0' changes the value by .*, its gains say"):
        check_gain_law(broken)


def test_an_objective_that_lists_nothing_is_refused() -> None:
    broken: Any = _Broken(objectives("mlp")["weights"], lambda inner, cluster, at: inner.gains(cluster, at))
    check_gain_law(broken)
    del broken.compared
    with pytest.raises(AssertionError, match="lists what it compares"):
        check_gain_law(broken)
