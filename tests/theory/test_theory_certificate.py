"""Certificates: proven bounds hold on dense grids, tighten with segments, and refuse what they cannot bound."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from isthmus.batches import Batch
from isthmus.certificates._activations import ACTIVATIONS, kink_gap
from isthmus.certificates._fold import fold_normalisation
from isthmus.certificates._layers import layer_norms
from isthmus.certificates._norms import convolution_norm, matrix_norm, pooling_norm
from isthmus.certificates._path import NetworksBetween
from isthmus.errors import CheckpointError, DataError, ModelError
from isthmus.evaluation import bind
from isthmus.symmetry import apply, discover, trace
from isthmus.testing import mlp, perturb, randomise_state, reference_inputs, reference_network
from isthmus.theory import certify


def pair(model: nn.Module, noise: float, seed: int = 0) -> tuple[nn.Module, nn.Module]:
    generator = torch.Generator().manual_seed(seed)
    a = randomise_state(model, generator).double().eval()
    b = copy.deepcopy(a)
    b.load_state_dict(perturb(a.state_dict(), noise, generator))
    return a, b


def examples(n: int, *shape: int, seed: int = 3) -> Tensor:
    return torch.randn(n, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def path_errors(a: nn.Module, b: nn.Module, x: Tensor, points: int) -> tuple[Tensor, list[Tensor]]:
    """Return the error of every example at every point of the folded path, and the outputs."""
    traced = trace(a, (x,))
    ends = [fold_normalisation(traced, m.state_dict()) for m in (a, b)]
    outputs: list[Tensor] = []
    ts = torch.linspace(0, 1, points, dtype=torch.float64)
    for t in ts:
        state = {k: (1 - t) * v + t * ends[1][k] if v.is_floating_point() else v for k, v in ends[0].items()}
        outputs.append(bind(a, state)(Batch((x,))))
    chords = [(1 - t) * outputs[0] + t * outputs[-1] for t in ts]
    errors = [(o - c).reshape(len(o), -1).norm(dim=1) for o, c in zip(outputs, chords, strict=True)]
    return torch.stack(errors), outputs


def small_residual_cnn() -> nn.Module:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(2, 6, 3, padding=1)
            self.norm = nn.BatchNorm2d(6)
            self.body = nn.Conv2d(6, 6, 3, padding=1, bias=False)
            self.body_norm = nn.BatchNorm2d(6)
            self.head = nn.Linear(6 * 4, 5)

        def forward(self, x: Tensor) -> Tensor:
            h = functional.relu(self.norm(self.stem(x)))
            h = functional.max_pool2d(functional.relu(h + self.body_norm(self.body(h))), 2)
            return self.head(functional.avg_pool2d(h, 2).flatten(1))

    torch.manual_seed(0)
    return Net()


NETWORKS = {
    "relu": lambda: mlp(7, 12, 2, 4),
    "tanh": lambda: mlp(7, 12, 3, 4, activation="tanh"),
    "gelu": lambda: mlp(7, 9, 2, 3, activation="gelu"),
    "one layer": lambda: mlp(7, 30, 1, 4),
    "no bias": lambda: mlp(7, 12, 2, 4, bias=False),
}


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("segments", [1, 3, 8])
def test_the_bound_holds_at_every_point_and_for_every_example(name: str, segments: int) -> None:
    torch.manual_seed(1)
    a, b = pair(NETWORKS[name](), 0.4)
    x = examples(11, 7)
    labels = torch.arange(11) % 3
    found = certify(a, b, [(x, labels)], segments=segments)
    errors, outputs = path_errors(a, b, x, 49)
    assert float(errors.mean(1).max()) <= found.lmc_error
    assert bool((errors.max(0).values <= found.per_example).all())
    losses = torch.stack([functional.cross_entropy(o, labels) for o in outputs])
    ts = torch.linspace(0, 1, 49, dtype=torch.float64)
    rise = losses - ((1 - ts) * losses[0] + ts * losses[-1])
    assert found.barrier is not None
    assert float(rise.max()) <= found.barrier
    accuracy = min(float((o.argmax(1) == labels).double().mean()) for o in outputs)
    assert found.accuracy_floor is not None
    assert found.accuracy_floor <= accuracy
    # the same, segment by segment
    for k in range(segments):
        inside = (ts >= k / segments) & (ts <= (k + 1) / segments)
        assert float(errors.mean(1)[inside].max()) <= float(found.envelope.error_bound[k])
        assert found.envelope.rise_bound is not None
        assert float(rise[inside].max()) <= float(found.envelope.rise_bound[k])


@pytest.mark.parametrize("seed", range(6))
def test_the_bound_holds_for_residual_convolutions(seed: int) -> None:
    a, b = pair(small_residual_cnn(), 0.3, seed)
    x = examples(5, 2, 8, 8)
    found = certify(a, b, [x], segments=4)
    errors, _ = path_errors(a, b, x, 33)
    assert float(errors.mean(1).max()) <= found.lmc_error
    assert bool((errors.max(0).values <= found.per_example).all())


@pytest.mark.parametrize(
    "name", ["vgg16_bn", "resnet20", "resnet20_zero_pad", "densenet", "unet", "mobilenet"]
)
def test_reference_networks_are_in_scope(name: str) -> None:
    a, b = pair(reference_network(name), 0.02)
    x = examples(2, *reference_inputs(name)[0].shape[1:])
    found = certify(a, b, [x], segments=2)
    errors, _ = path_errors(a, b, x, 9)
    assert 0 < float(errors.mean(1).max()) <= found.lmc_error < math.inf


def test_more_segments_tighten_the_bound() -> None:
    torch.manual_seed(1)
    a, b = pair(mlp(7, 24, 2, 4), 0.3)
    x = examples(20, 7)
    ratios = [certify(a, b, [x], segments=k).ratio for k in (1, 4, 16, 64)]
    assert ratios == sorted(ratios, reverse=True)
    assert ratios[-1] <= 1.05


def test_identical_and_relabelled_networks_have_no_error() -> None:
    a, _ = pair(mlp(7, 12, 2, 4), 0.1)
    x = examples(4, 7)
    assert certify(a, a, [x]).lmc_error <= 1.01e-9
    spec = discover(a, x)
    permutations = {g: torch.roll(torch.arange(12), 1) for g in spec.groups}
    moved = apply(spec, permutations, a.state_dict())
    back = apply(spec, {g: torch.roll(torch.arange(12), -1) for g in spec.groups}, moved)
    assert certify(a, back, [x]).lmc_error <= 1.01e-9
    assert certify(a, moved, [x]).lmc_error > 1e-3


def test_squared_loss_is_bounded() -> None:
    torch.manual_seed(2)
    a, b = pair(mlp(5, 10, 2, 3), 0.4)
    x, y = examples(8, 5), examples(8, 3, seed=9)
    found = certify(a, b, [(x, y)], segments=3, loss="mse")
    _, outputs = path_errors(a, b, x, 41)
    losses = torch.stack([(o - y).square().mean() for o in outputs])
    ts = torch.linspace(0, 1, 41, dtype=torch.float64)
    rise = losses - ((1 - ts) * losses[0] + ts * losses[-1])
    assert found.barrier is not None
    assert float(rise.max()) <= found.barrier
    assert found.accuracy_floor is None


def test_batches_add_up() -> None:
    a, b = pair(mlp(5, 10, 2, 3), 0.4)
    x, y = examples(10, 5), torch.arange(10) % 3
    whole = certify(a, b, [(x, y)], segments=3)
    parts = certify(a, b, [(x[:7], y[:7]), (x[7:], y[7:])], segments=3)
    assert parts.lmc_error == pytest.approx(whole.lmc_error, rel=1e-12)
    assert parts.barrier == pytest.approx(whole.barrier, rel=1e-9)
    assert parts.examples == 10


def test_folding_keeps_the_function() -> None:
    for name in ("vgg16_bn", "resnet20", "densenet"):
        a, _ = pair(reference_network(name), 0.1)
        x = examples(2, *reference_inputs(name)[0].shape[1:])
        folded = fold_normalisation(trace(a, (x,)), a.state_dict())
        torch.testing.assert_close(bind(a, folded)(Batch((x,))), a(x))


def test_a_normalisation_by_a_computed_gain_has_no_fixed_factor() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(5)

        def forward(self, x: Tensor) -> Tensor:
            n = self.norm
            return functional.batch_norm(x, n.running_mean, n.running_var, n.weight.exp(), n.bias)

    net = Net().double().eval()
    with pytest.raises(ModelError, match="computed tensors, or the statistics of the batch"):
        layer_norms(trace(net, (examples(3, 5),)), net.state_dict())
    with pytest.raises(ModelError, match="has no weight of its own"):
        certify(net, net, [examples(3, 5)])


def test_nothing_is_mutated() -> None:
    a, b = pair(small_residual_cnn(), 0.3)
    before = [v.clone() for m in (a, b) for v in m.state_dict().values()]
    certify(a, b, [examples(3, 2, 8, 8)], segments=2)
    after = [v for m in (a, b) for v in m.state_dict().values()]
    assert all(torch.equal(v, w) for v, w in zip(before, after, strict=True))


def test_matrix_norm_is_exact() -> None:
    for shape in ((3, 5), (5, 3), (1, 4)):
        m = examples(*shape)
        exact = float(torch.linalg.matrix_norm(m, 2))
        assert exact <= matrix_norm(m) <= exact * (1 + 1e-8)
    assert matrix_norm(torch.zeros(0, 3)) == 0


@pytest.mark.parametrize("rank", [1, 2])
@pytest.mark.parametrize(
    ("stride", "dilation", "groups"), [(1, 1, 1), (2, 1, 1), (1, 2, 1), (1, 1, 2), (2, 2, 2)]
)
@pytest.mark.parametrize("turned", [False, True])
def test_convolution_norm_bounds_the_dense_operator(
    rank: int, stride: int, dilation: int, groups: int, turned: bool
) -> None:
    kernel = examples(4, 4 // groups, *(3,) * rank)
    size = (6,) * rank
    x = torch.eye(4 * 6**rank, dtype=torch.float64).reshape(-1, 4, *size)
    if turned:
        operator = functional.conv_transpose1d if rank == 1 else functional.conv_transpose2d
        y = operator(x, kernel, stride=stride, padding=1, dilation=dilation, groups=groups)
        space = list(y.shape[2:])
    else:
        direct = functional.conv1d if rank == 1 else functional.conv2d
        y = direct(x, kernel, stride=stride, padding=1, dilation=dilation, groups=groups)
        space = list(size)
    exact = float(torch.linalg.matrix_norm(y.flatten(1), 2))
    bound = convolution_norm(kernel, space, dilation=[dilation] * rank, groups=groups, turned=turned)
    assert exact <= bound
    if stride == 1:
        assert bound <= 1.6 * exact


@pytest.mark.parametrize(("kernel", "stride"), [(2, 2), (3, 1), (3, 2), (2, 3)])
def test_pooling_norm_bounds_the_dense_operator(kernel: int, stride: int) -> None:
    x = torch.eye(49, dtype=torch.float64).reshape(-1, 1, 7, 7)
    exact = float(torch.linalg.matrix_norm(functional.avg_pool2d(x, kernel, stride).flatten(1), 2))
    assert exact <= pooling_norm([kernel] * 2, [stride] * 2) + 1e-12


CALLS = {
    "aten.relu": torch.relu,
    "aten.leaky_relu": lambda x: functional.leaky_relu(x, 0.2),
    "aten.abs": torch.abs,
    "aten.relu6": functional.relu6,
    "aten.hardtanh": functional.hardtanh,
    "aten.hardsigmoid": functional.hardsigmoid,
    "aten.hardswish": functional.hardswish,
    "aten.tanh": torch.tanh,
    "aten.sigmoid": torch.sigmoid,
    "aten.softplus": functional.softplus,
    "aten.gelu": functional.gelu,
    "aten.silu": functional.silu,
    "aten.elu": functional.elu,
    "aten.celu": functional.celu,
    "aten.mish": functional.mish,
    "aten.erf": torch.erf,
    "aten.log_sigmoid": functional.logsigmoid,
    "aten.clamp": lambda x: x.clamp(-0.5, 2.0),
    "aten.clamp_min": lambda x: x.clamp_min(-0.5),
    "aten.clamp_max": lambda x: x.clamp_max(0.5),
    "aten.rrelu": lambda x: functional.rrelu(x, 0.1, 0.5, training=False),
    "aten.selu": functional.selu,
    "aten.sin": torch.sin,
    "aten.cos": torch.cos,
}


@pytest.mark.parametrize("name", CALLS)
def test_activation_constants_hold_on_random_pairs(name: str) -> None:
    known = ACTIVATIONS[name]
    given = {"negative_slope": 0.2, "lower": 0.1, "upper": 0.5, "beta": 1.0, "threshold": 20.0}
    given |= {"alpha": 1.0, "scale": 1.0, "input_scale": 1.0}
    function = CALLS[name]
    a, b = 3 * examples(4000, seed=1), 3 * examples(4000, seed=2)
    a[:500] *= 30
    b[250:750] *= 30
    slopes = (function(a) - function(b)) / (a - b)
    low, high = known.slopes(given)
    assert low - 1e-9 <= float(slopes.min())
    assert float(slopes.max()) <= high + 1e-9
    assert known.lipschitz(given) == max(abs(low), abs(high))
    gaps = torch.stack(
        [
            (function((1 - t) * a + t * b) - (1 - t) * function(a) - t * function(b)).abs()
            for t in torch.linspace(0, 1, 33, dtype=torch.float64)
        ]
    )
    bound = known.gap(a, b, function(a), function(b), given)
    assert bool((gaps.max(0).values <= bound * (1 + 1e-9) + 1e-12).all())
    # never above what the slopes alone give, whatever the values at the ends
    assert bool((bound <= (high - low) / 4 * (a - b).abs() + 2 * known.jump(given) + 1e-12).all())
    assert float(known.gap(a, a, function(a), function(a), given).max()) <= 2 * known.jump(given)


def test_kink_gap_is_exact_for_relu() -> None:
    a, b = examples(500, seed=1), examples(500, seed=2)
    ts = torch.linspace(0, 1, 4001, dtype=torch.float64)[:, None]
    gap = (torch.relu((1 - ts) * a + ts * b) - (1 - ts) * a.relu() - ts * b.relu()).abs().max(0).values
    torch.testing.assert_close(gap, kink_gap(a, b), atol=2e-3, rtol=0)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.LayerNorm(6)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x).softmax(-1)


class Mixes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x).transpose(0, 1)


class Gated(Mixes):
    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) * x


class Reparametrised(Mixes):
    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, torch.tanh(self.layer.weight))


@pytest.mark.parametrize(
    ("network", "words"),
    [
        (Attention, "layer_norm in 'inner' is out of scope"),
        (Mixes, "mixes examples"),
        (Gated, "product of activations"),
        (Reparametrised, "not a parameter"),
    ],
)
def test_what_is_out_of_scope_is_named(network: type[nn.Module], words: str) -> None:
    model = network().double().eval()
    with pytest.raises(ModelError, match=words):
        certify(model, model, [examples(6, 6)])


def test_bad_input() -> None:
    a, b = pair(mlp(5, 10, 2, 3), 0.4)
    x = examples(4, 5)
    with pytest.raises(DataError, match="unknown loss"):
        certify(a, b, [x], loss="hinge")
    with pytest.raises(DataError, match="segments"):
        certify(a, b, [x], segments=0)
    with pytest.raises(DataError, match="at least one batch"):
        certify(a, b, [])
    with pytest.raises(CheckpointError, match="different architectures"):
        certify(a, mlp(5, 10, 3, 3), [x])
    with pytest.raises(ModelError, match="training mode"):
        certify(small_residual_cnn().train(), small_residual_cnn(), [examples(2, 2, 8, 8)])

    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.norm = nn.Linear(5, 4), nn.BatchNorm1d(4, affine=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.layer(x))

    bare = Bare().eval()
    with pytest.raises(ModelError, match="no weight of its own"):
        certify(bare, bare, [x])


@pytest.mark.parametrize(("noise", "slack"), [(0.3, 1.01), (3.0, 1.5)])
def test_norms_between_the_knots_are_never_too_small(noise: float, slack: float) -> None:
    """More segments than knots: chords of a convex function lie above it, and between near networks hardly higher."""
    a, b = pair(small_residual_cnn(), noise)
    path = NetworksBetween(a, b, a.state_dict(), b.state_dict())
    traced = path.traced(Batch((examples(2, 2, 8, 8),)))
    for t in torch.linspace(0, 1, 41, dtype=torch.float64).tolist():
        exact, bound = layer_norms(traced, path.state(t)), path.norms(t, traced)
        assert exact.keys() == bound.keys()
        for name, norm in exact.items():
            assert norm <= bound[name] * (1 + 1e-12)
            assert bound[name] <= slack * norm


@pytest.mark.parametrize("kind", ["ignored", "probabilities"])
def test_targets_without_a_bound_are_refused(kind: str) -> None:
    """Where some labels do not count the loss is steeper, so the slope of a mean over all would be too small."""
    torch.manual_seed(0)
    a, b = (nn.Linear(3, 4).double().eval() for _ in "ab")
    x, labels = torch.randn(5, 3).double(), torch.tensor([0, -100, 1, 2, 3])
    targets = labels if kind == "ignored" else torch.rand(5, 4).softmax(1)
    with pytest.raises(DataError, match="bound on the cross-entropy is for one class per position, found"):
        certify(a, b, [(x, targets)], segments=2)
