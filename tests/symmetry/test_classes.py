"""What may act on the units of a group: classes, powers, limits, and that they hold when random elements act."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm

import isthmus
from isthmus.couplings import Linear, Monomial, Permutation, Rotation
from isthmus.errors import SymmetryError
from isthmus.symmetry import (
    Acts,
    SymmetrySpec,
    discover,
    drawn_elements,
    function_change,
    random_element,
    verify,
)
from isthmus.symmetry._elements import class_of
from isthmus.symmetry._powers import System

TOLERANCE = 1e-10


def powers(spec: SymmetrySpec, group: str) -> dict[str, int | None]:
    return {f"{s.tensor}[{s.axis}]": s.power for s in spec.groups[group].slots}


def discovered(
    net: nn.Module, *inputs: Tensor, ones: Sequence[str] = (), zeros: Sequence[str] = ()
) -> SymmetrySpec:
    """Discover, and hold random elements of the declared classes against the network."""
    torch.manual_seed(0)
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.7)
    for name in ones:
        nn.init.ones_(net.get_parameter(name))
    for name in zeros:
        nn.init.zeros_(net.get_parameter(name))
    net = net.eval().double()
    given = tuple(x.double() if x.is_floating_point() else x for x in inputs)
    spec = discover(net, given, ones=ones, zeros=zeros)
    source = torch.Generator().manual_seed(1)
    for element in drawn_elements(spec, source, 3):
        assert function_change(spec, element, net, given) < TOLERANCE
    return spec


def between(function: nn.Module) -> SymmetrySpec:
    return discovered(nn.Sequential(nn.Linear(4, 6), function, nn.Linear(6, 3)), torch.randn(5, 4))


@pytest.mark.parametrize(
    ("function", "acts"),
    [
        (nn.Identity(), Acts.GENERAL),
        (nn.ReLU(), Acts.POSITIVE),
        (nn.LeakyReLU(0.2), Acts.POSITIVE),
        (nn.PReLU(6), Acts.POSITIVE),
        (nn.Tanh(), Acts.SIGNED),
        (nn.Softsign(), Acts.SIGNED),
        (nn.Hardtanh(), Acts.SIGNED),
        (nn.Hardshrink(), Acts.SIGNED),
        (nn.GELU(), Acts.PERMUTATION),
        (nn.GELU(approximate="tanh"), Acts.PERMUTATION),
        (nn.SiLU(), Acts.PERMUTATION),
        (nn.Sigmoid(), Acts.PERMUTATION),
        (nn.ReLU6(), Acts.PERMUTATION),
        (nn.ELU(), Acts.PERMUTATION),
        (nn.Softmax(-1), Acts.PERMUTATION),
        (nn.LayerNorm(6, elementwise_affine=False), Acts.MEAN_FIXING),
        (nn.RMSNorm(6, elementwise_affine=False), Acts.ORTHOGONAL),
        (nn.BatchNorm1d(6), Acts.MONOMIAL),
    ],
    ids=str,
)
def test_the_class_of_hidden_units_follows_their_function(function: nn.Module, acts: Acts) -> None:
    """Each function allows what commutes with it, and no more."""
    assert between(function).groups["0"].acts is acts


class _Written(nn.Module):
    """A network whose function is given."""

    def __init__(self, function: object, **layers: nn.Module) -> None:
        super().__init__()
        self.function = function
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)  # type: ignore[operator]


def written(function: object, hidden: int = 6) -> SymmetrySpec:
    layers = {"first": nn.Linear(4, hidden), "second": nn.Linear(4, hidden), "last": nn.Linear(hidden, 3)}
    return discovered(_Written(function, **layers), torch.randn(5, 4))


@pytest.mark.parametrize(
    ("function", "acts"),
    [
        (lambda m, x: m.last(m.first(x).abs()), Acts.POSITIVE),
        (lambda m, x: m.last(m.first(x) ** 2), Acts.POSITIVE),
        (lambda m, x: m.last(m.first(x) ** 3), Acts.MONOMIAL),
        (lambda m, x: m.last(m.first(x) + 1), Acts.MEAN_FIXING),
        (lambda m, x: m.last(F.relu(m.first(x)) + 1), Acts.PERMUTATION),
        (lambda m, x: m.last(m.first(x) * 3), Acts.GENERAL),
        (lambda m, x: m.last(F.relu(m.first(x)) + m.second(x)), Acts.POSITIVE),
        (lambda m, x: m.last(torch.tanh(m.first(x)) + m.second(x)), Acts.SIGNED),
        (lambda m, x: m.last(torch.tanh(m.first(x)) + F.relu(m.second(x))), Acts.PERMUTATION),
        (lambda m, x: m.last(F.silu(m.first(x)) * m.second(x)), Acts.MONOMIAL),
        (lambda m, x: m.last(F.normalize(m.first(x), dim=-1)), Acts.ORTHOGONAL),
        (lambda m, x: m.last(m.first(x) / (1 + m.second(x).abs())), Acts.MONOMIAL),
        (lambda m, x: m.last(torch.maximum(m.first(x), m.second(x))), Acts.POSITIVE),
        (lambda m, x: m.last(torch.where(m.first(x) > 0, m.second(x), 0.0)), Acts.MONOMIAL),
        (lambda m, x: m.last(m.first(x)) + m.first(x).sum(-1, keepdim=True), Acts.MEAN_FIXING),
        (lambda m, x: m.last(m.first(x)) + m.first(x).amax(-1, keepdim=True), Acts.PERMUTATION),
        (lambda m, x: m.last(m.first(x)) + m.first(x).norm(dim=-1, keepdim=True), Acts.ORTHOGONAL),
        (lambda m, x: m.last(F.softmax(m.first(x), 0)), Acts.PERMUTATION),
        (lambda m, x: m.last(F.dropout(m.first(x), 0.5, training=False)), Acts.GENERAL),
        (lambda m, x: m.last(torch.cat([m.first(x), m.first(x)])[:5]), Acts.GENERAL),
        (lambda m, x: (m.first(x) @ m.first(x).T) @ x[:, :3], Acts.ORTHOGONAL),
        (lambda m, x: (m.first(x) @ m.second(x).T) @ x[:, :3], Acts.GENERAL),
        (lambda m, x: m.last(F.threshold(m.first(x), 0.5, 0.0)), Acts.PERMUTATION),
        (lambda m, x: m.last(m.first(x).clamp(min=0)), Acts.POSITIVE),
        (lambda m, x: m.last(m.first(x).clamp(-1, 1)), Acts.SIGNED),
        (lambda m, x: m.last(m.first(x).clamp(-1, 2)), Acts.PERMUTATION),
        (lambda m, x: m.last(torch.cumsum(m.first(x), 0)), Acts.GENERAL),
        (lambda m, x: m.last(m.first(x).repeat_interleave(2, 0)), Acts.GENERAL),
        (lambda m, x: m.last(m.first(x).view(5, 1, 6).transpose(0, 1).reshape(5, 6)), Acts.GENERAL),
    ],
)
def test_the_class_of_what_is_written_out(function: object, acts: Acts) -> None:
    """Every operator on the way takes away what it does not commute with."""
    assert written(function).groups["first"].acts is acts


def test_factors_sit_on_the_last_gain_before_the_units_are_read() -> None:
    """What comes before a norm forgets factors, so they sit on its gain and bias."""
    net = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 4, 2))
    spec = discovered(net, torch.randn(2, 3, 8, 8))
    assert spec.groups["0"].acts is Acts.POSITIVE
    assert powers(spec, "0") == {
        "0.weight[0]": 0,
        "0.bias[0]": 0,
        "1.weight[0]": 1,
        "1.bias[0]": 1,
        "1.running_mean[0]": 0,
        "1.running_var[0]": 0,
        "4.weight[1]": -1,
    }


def test_a_gate_keeps_its_size_while_what_it_gates_is_scaled() -> None:
    """In a gated layer factors act on what is multiplied by the gate, also where one matrix makes both."""
    spec = written(lambda m, x: m.last(F.silu(m.first(x)) * m.second(x)))
    assert powers(spec, "first")["first.weight[0]"] == 0
    assert powers(spec, "first")["second.weight[0]"] == 1
    layers = {"both": nn.Linear(4, 12), "last": nn.Linear(6, 3)}

    def run(m: nn.Module, x: Tensor) -> Tensor:
        gate, up = m.both(x).chunk(2, -1)  # type: ignore[operator]
        return m.last(F.silu(gate) * up)  # type: ignore[operator]

    fused = discovered(_Written(run, **layers), torch.randn(5, 4))
    (group,) = fused.groups.values()
    assert group.acts is Acts.MONOMIAL
    assert [s.power for s in group.slots if s.tensor == "both.weight"] == [0, 1]


def cells(layer: nn.Module) -> list[Acts]:
    size = 12 if getattr(layer, "bidirectional", False) else 6
    net = _Written(lambda m, x: m.last(m.cell(x)[0]), cell=layer, last=nn.Linear(size, 3))
    return [group.acts for group in discovered(net, torch.randn(7, 4)).groups.values()]


@pytest.mark.parametrize("layer", [nn.LSTM, nn.GRU, nn.RNN])
def test_candidates_of_recurrent_cells_change_their_signs_and_gates_do_not(layer: type[nn.Module]) -> None:
    """The sign of a unit is that of its candidate; gates are squashed to positive numbers."""
    assert cells(layer(4, 6)) == [Acts.SIGNED]
    assert cells(layer(4, 6, 2, bidirectional=True)) == [Acts.SIGNED] * 4


def test_rectified_recurrent_cells_are_scaled() -> None:
    """A rectifier lets positive factors pass."""
    assert cells(nn.RNN(4, 6, 2, nonlinearity="relu")) == [Acts.POSITIVE] * 2


def test_normalised_weights_keep_factors_on_their_lengths() -> None:
    """Rows of a weight-normalised layer are scaled by their lengths; columns change signs alone."""
    net = nn.Sequential(
        weight_norm(nn.Linear(4, 6)), nn.Tanh(), weight_norm(nn.Linear(6, 5)), nn.ReLU(), nn.Linear(5, 3)
    )
    spec = discovered(net, torch.randn(5, 4))
    assert [g.acts for g in spec.groups.values()] == [Acts.SIGNED, Acts.POSITIVE]


class _Attention(nn.Module):
    def __init__(self, *, normed: bool = False) -> None:
        super().__init__()
        self.qkv, self.out, self.normed = nn.Linear(8, 24), nn.Linear(8, 8), normed

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).reshape(2, 5, 3, 2, 4).permute(2, 0, 3, 1, 4)
        if self.normed:
            q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(2, 5, 8))


def test_dimensions_of_a_head_are_general_and_heads_change_places() -> None:
    """Query and key cancel, value and output cancel; norms on queries and keys leave rotations."""
    spec = discovered(_Attention(), torch.randn(2, 5, 8))
    inner = [g for g in spec.groups.values() if g.within]
    assert {g.acts for g in inner} == {Acts.GENERAL}
    assert {g.acts for g in spec.groups.values() if not g.within} == {Acts.PERMUTATION}
    first = [s.power for s in inner[0].slots if s.tensor == "qkv.weight"]
    assert sorted(p for p in first if p is not None) == [-1, 1]
    normed = discovered(_Attention(normed=True), torch.randn(2, 5, 8))
    assert {g.acts for g in normed.groups.values() if g.within} == {Acts.ORTHOGONAL, Acts.GENERAL}


class _Stream(nn.Module):
    """A residual stream with norms, as in transformers."""

    def __init__(self, norm: type[nn.Module], *, tied: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 6)
        self.norms = nn.ModuleList(norm(6) for _ in range(2))
        self.up, self.down = nn.Linear(6, 9), nn.Linear(9, 6)
        self.head = nn.Linear(6, 7, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        h = h + self.down(F.gelu(self.up(self.norms[0](h))))
        return self.head(self.norms[1](h))


@pytest.mark.parametrize(("norm", "acts"), [(nn.LayerNorm, Acts.MEAN_FIXING), (nn.RMSNorm, Acts.ORTHOGONAL)])
@pytest.mark.parametrize("tied", [False, True])
def test_streams_rotate_once_their_norms_are_folded(norm: type[nn.Module], acts: Acts, tied: bool) -> None:
    """Gains of their own for every unit mix with no rotation, but leave signs; gains that are one mix with it."""
    ids = torch.randint(0, 7, (3, 5))
    net = _Stream(norm, tied=tied)
    group = next(g for g in discovered(net, ids).groups.values() if g.size == 6)
    assert group.acts is (Acts.PERMUTATION if norm is nn.LayerNorm else Acts.SIGNED)
    gains = [f"norms.{k}.weight" for k in range(2)]
    biases = [f"norms.{k}.bias" for k in range(2)] if norm is nn.LayerNorm else []
    spec = discovered(net, ids, ones=gains, zeros=biases)
    group = next(g for g in spec.groups.values() if g.size == 6)
    assert group.acts is acts
    assert not {s.tensor for s in group.slots} & {*gains, *biases}
    assert verify(spec, net, (ids,)).passed  # which leaves ones and zeros as they are
    assert SymmetrySpec.from_json(spec.to_json()).ones == tuple(sorted(gains))
    one = {s.tensor: s.power for s in group.slots}
    assert one["down.weight"] == 1
    assert tied or one["head.weight"] == -1


def test_unknown_names_of_folded_tensors_are_refused() -> None:
    """A name that the network lacks is an error, not a silent nothing."""
    with pytest.raises(
        SymmetryError, match=r"no tensor 'norm\.gain' that could be known to be ones or zeros"
    ):
        discover(nn.Linear(3, 3), torch.zeros(1, 3), ones=["norm.gain"])


def test_what_prevents_a_larger_class_is_named() -> None:
    """The table names the operator and the module."""
    spec = between(nn.GELU())
    (limit,) = spec.groups["0"].limits
    assert str(limit) == "invertible maps, were it not for gelu in 1"
    assert "(invertible maps, were it not for gelu in 1)" in str(spec)
    assert "positive scales" in str(between(nn.ReLU()))


def test_classes_and_powers_are_kept_in_json() -> None:
    """What is written is read again; older specs know permutations alone."""
    spec = between(nn.ReLU())
    again = SymmetrySpec.from_json(spec.to_json())
    assert again == spec
    assert powers(again, "0") == powers(spec, "0")
    text = spec.to_json().replace('"power": 1', '"power": "much"')
    with pytest.raises(SymmetryError, match="expected a whole number as the power of a slot, found 'much'"):
        SymmetrySpec.from_json(text)


@pytest.mark.parametrize(
    ("function", "acts"),
    [
        (nn.GELU(), Acts.SIGNED),
        (nn.ReLU(), Acts.MONOMIAL),
        (nn.Tanh(), Acts.POSITIVE),
        (nn.LayerNorm(6, elementwise_affine=False), Acts.ORTHOGONAL),
        (nn.RMSNorm(6, elementwise_affine=False), Acts.GENERAL),
    ],
    ids=str,
)
def test_verification_catches_a_class_that_is_too_large(function: nn.Module, acts: Acts) -> None:
    """Random elements of the declared class are tried, and the guilty group is named."""
    net = nn.Sequential(nn.Linear(4, 6), function, nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)).eval()
    x = torch.randn(8, 4)
    spec = discover(net, x)
    assert verify(spec, net, x).passed
    assert verify(spec, net, x).elements == 2
    group = spec.groups["0"]
    slots = [replace(s, power=-1 if s.role == "reads" else 1) for s in group.slots]
    wrong = spec.with_group(replace(group, acts=acts, slots=tuple(slots)))
    found = verify(wrong, net, x)
    assert not found.passed
    assert found.guilty == ("0",)
    assert verify(wrong, net, x, symmetry="permutations").passed


def test_verification_catches_a_wrong_power() -> None:
    """A tensor that should keep its size is scaled."""
    net = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3)).eval()
    x = torch.randn(8, 4)
    spec = discover(net, x)
    group = spec.groups["0"]
    slots = [replace(s, power=1) if s.tensor == "1.running_mean" else s for s in group.slots]
    assert not verify(spec.with_group(replace(group, slots=tuple(slots))), net, x).passed


def test_random_elements_are_of_their_class() -> None:
    """Signs are signs, factors positive, rotations orthogonal and mean-fixing."""
    source = torch.Generator().manual_seed(0)
    order = torch.randperm(8, generator=source)
    kinds = {acts: random_element(acts, order, source, "halves" if acts.pairs else "") for acts in Acts}
    assert isinstance(kinds[Acts.PERMUTATION], Permutation)
    signs, sizes, both = (kinds[a] for a in (Acts.SIGNED, Acts.POSITIVE, Acts.MONOMIAL))
    assert isinstance(signs, Monomial)
    assert set(signs.factors.tolist()) == {-1.0, 1.0}
    assert isinstance(sizes, Monomial)
    assert bool((sizes.factors > 0).all())
    assert isinstance(both, Monomial)
    assert bool((both.factors < 0).any())
    fixing, rotation, general = (kinds[a] for a in (Acts.MEAN_FIXING, Acts.ORTHOGONAL, Acts.GENERAL))
    assert isinstance(fixing, Rotation)
    assert isinstance(rotation, Rotation)
    assert isinstance(general, Linear)
    ones = torch.ones(8, dtype=torch.float64)
    assert torch.allclose(fixing.values @ ones, ones)
    assert not torch.allclose(rotation.values @ ones, ones)
    assert float(torch.linalg.cond(general.values)) < 100


@pytest.mark.parametrize(
    ("function", "element", "words"),
    [
        (nn.ReLU(), Acts.SIGNED, "only positive scales leave the function alone, found signs"),
        (nn.ReLU(), Acts.ORTHOGONAL, "only positive scales leave the function alone, found rotations"),
        (nn.Tanh(), Acts.MONOMIAL, "only signs leave the function alone, found signs and scales"),
        (
            nn.LayerNorm(6, elementwise_affine=False),
            Acts.ORTHOGONAL,
            "only rotations that fix the mean leave",
        ),
        (
            nn.RMSNorm(6, elementwise_affine=False),
            Acts.GENERAL,
            "only rotations leave the function alone, found inv",
        ),
    ],
)
def test_a_coupling_of_a_larger_class_is_refused(function: nn.Module, element: Acts, words: str) -> None:
    """What would change the function is refused by name, not applied."""
    net = nn.Sequential(nn.Linear(4, 6), function, nn.Linear(6, 3)).eval()
    spec = discover(net, torch.randn(5, 4))
    coupling = random_element(element, torch.arange(6), torch.Generator().manual_seed(3))
    assert class_of(coupling) is element
    with pytest.raises(SymmetryError, match=words):
        isthmus.apply(spec, {"0": coupling}, net.state_dict())
    unit = Monomial(torch.arange(6), torch.ones(6))
    assert class_of(unit) is Acts.PERMUTATION
    isthmus.apply(spec, {"0": unit}, net.state_dict())


def test_classes_are_ordered() -> None:
    """Every class contains permutations but those of pairs, which keep their places, and general all."""
    for acts in Acts:
        assert acts.contains(Acts.PERMUTATION) != acts.pairs
        assert Acts.GENERAL.contains(acts)
        assert acts.words
    assert not Acts.MEAN_FIXING.contains(Acts.SIGNED)
    assert Acts.ORTHOGONAL.contains(Acts.SIGNED)
    assert not Acts.POSITIVE.contains(Acts.SIGNED)


def test_equations_are_solved_with_wishes_where_they_leave_a_choice() -> None:
    """Demands hold, wishes are fulfilled in order as far as they can be."""
    from fractions import Fraction as Q

    from isthmus.symmetry._powers import ONE, wished

    system = System()
    assert system.demand({0: Q(1), 1: Q(-2)})
    assert system.demand({1: Q(1), 2: Q(1), ONE: Q(-3)})
    solved = wished(system, [(0, 4), (2, 5)]).solution([0, 1, 2])
    assert solved == {0: 4, 1: 2, 2: 1}
    assert not system.copy().demand_all([{1: Q(1)}, {2: Q(1)}])


def test_alignments_do_not_change_with_the_classes() -> None:
    """Permutations are matched and stored as before."""
    nets = [nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)).eval() for _ in range(2)]
    found = isthmus.align(nets[0], nets[1], args=torch.randn(2, 4), method="weights")
    assert {p.dtype for p in found.permutations.values()} == {torch.int64}
