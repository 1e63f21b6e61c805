"""``dimension``: what is measured equals the formulas of Theory, section 8, on every kind of group."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from isthmus.errors import CheckpointError, DataError, ModelError
from isthmus.matching import Dimension, DimensionTable, dimension
from isthmus.symmetry import SymmetrySpec, discover
from isthmus.testing import gpt, mlp, randomise_state, reference_inputs, reference_network
from isthmus.transport import approximate_dimension, entropy_rank, stable_rank

METHODS = ["weights-incoming", "weights", "covariance", "activations", "correlation"]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def network(width: int = 12) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return randomise_state(mlp(6, width, 2, 4), generator()).double().eval()


def examples(count: int = 60) -> Tensor:
    return torch.rand(count, 6, generator=generator(1), dtype=torch.float64)


def test_each_method_measures_its_own_matrix() -> None:
    model, x = network(), examples()
    table = dimension(model, [x[:40], x[40:]])
    assert list(table.methods) == METHODS
    assert dict(table.sizes) == {"layers.0": 12, "layers.1": 12}
    state = {k: v.double() for k, v in model.state_dict().items()}
    w, b, out = state["layers.1.weight"], state["layers.1.bias"], state["layers.2.weight"]
    h = torch.relu(model.layers[0](x)).detach()
    z = model.layers[1](h).detach()
    rows = torch.cat([w, b[:, None], out.T], 1)
    # Factors with one row per unit for weights, one row per example for covariance and activations.
    factors = {"weights-incoming": w, "weights": rows, "covariance": z, "activations": torch.relu(z)}
    for method, factor in factors.items():
        found = table.methods[method]["layers.1"]
        assert found.uncentred == pytest.approx(approximate_dimension(factor), rel=1e-9)
        assert found.centred == pytest.approx(approximate_dimension(factor, center=True), rel=1e-9)
        assert found.stable_rank == pytest.approx(stable_rank(factor), rel=1e-9)
        assert found.entropy_rank == pytest.approx(entropy_rank(factor), rel=1e-9)


def test_correlation_measures_units_scaled_to_one_and_leaves_out_constant_ones() -> None:
    model, x = network(), examples()
    with torch.no_grad():
        model.layers[1].bias[:2] = -100.0
        model.layers[1].bias[2] = 100.0
        model.layers[1].weight[2] *= 1e-9
    table = dimension(model, [x[:40], x[40:]])
    activations = torch.relu(model.layers[1](torch.relu(model.layers[0](x)))).detach()
    found = table.methods["correlation"]["layers.1"]
    alive = activations[:, activations.square().mean(0) > 0]
    scaled = alive / alive.square().mean(0).sqrt()
    assert found.uncentred == pytest.approx(approximate_dimension(scaled), rel=1e-9)
    assert found.entropy_rank == pytest.approx(entropy_rank(scaled), rel=1e-9)
    varying = activations[:, activations.std(0) > 1e-6 * activations.mean(0)]
    assert varying.shape[1] < alive.shape[1] <= 10
    varying = varying - varying.mean(0)
    varying = varying / varying.square().mean(0).sqrt()
    assert found.centred == pytest.approx(approximate_dimension(varying), rel=1e-9)


def test_ranks_can_be_left_out() -> None:
    model, x = network(), examples()
    whole, short = dimension(model, [x]), dimension(model, [x], ranks=False)
    for method, groups in whole.methods.items():
        for name, found in groups.items():
            other = short.methods[method][name]
            assert (other.uncentred, other.centred) == (found.uncentred, found.centred)
            assert math.isnan(other.stable_rank)
            assert math.isnan(other.entropy_rank)
    assert short.to_dict()["weights"]["layers.0"]["stable_rank"] is None


def test_reference_value() -> None:
    """Theory, section 8: the reference matrix, as incoming weights of 512 units."""
    numpy = pytest.importorskip("numpy")
    matrix = torch.from_numpy(numpy.random.default_rng(0).standard_normal((512, 64)))
    model = mlp(64, 512, 1, 2).double().eval()
    with torch.no_grad():
        model.layers[0].weight.copy_(matrix)
    found = dimension(model, args=torch.zeros(1, 64, dtype=torch.float64)).methods["weights-incoming"]
    assert found["layers.0"].uncentred == pytest.approx(56.573236258244, rel=1e-10)
    assert found["layers.0"].stable_rank == pytest.approx(36.0895, abs=1e-4)
    assert found["layers.0"].entropy_rank == pytest.approx(59.9312, abs=1e-4)


@pytest.mark.parametrize("name", ["vgg16_bn", "densenet", "mobilenet", "groupnorm_resnet"])
def test_every_group_of_every_network_is_measured_and_ordered(name: str) -> None:
    model = randomise_state(reference_network(name), generator()).eval()
    x = reference_inputs(name, 8, generator=generator(1))[0]
    check_order(dimension(model, [x]))


def check_order(table: DimensionTable) -> None:
    """Stable rank ≤ approximate dimension ≤ entropy rank ≤ units."""
    assert list(table.methods) == METHODS
    for groups in table.methods.values():
        assert set(groups) == set(table.sizes)
        for group, found in groups.items():
            if not math.isnan(found.uncentred):
                chain = [1.0, found.stable_rank, found.uncentred, found.entropy_rank, table.sizes[group]]
                assert all(low <= high * (1 + 1e-9) for low, high in itertools.pairwise(chain))


def test_nested_groups_and_token_inputs() -> None:
    model = gpt(vocabulary=11, width=8, depth=1, heads=2, context=5).eval()
    tokens = torch.randint(0, 11, (6, 5), generator=generator(3))
    table = dimension(model, [tokens])
    assert set(table.sizes) == set(discover(model, (tokens[:2],)).groups)
    check_order(table)


def test_several_layers_add_their_matrices() -> None:
    """Two layers that write one stream are one layer with the features of both."""

    class Stream(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two, self.out = nn.Linear(3, 6), nn.Linear(3, 6), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(torch.relu(self.one(x) + self.two(x.flip(1))))

    model, x = Stream().double().eval(), examples()[:, :3]
    table = dimension(model, [x])
    (group,) = table.sizes
    rows = torch.cat([model.one.weight, model.two.weight], 1).detach()
    assert table.methods["weights-incoming"][group].uncentred == pytest.approx(approximate_dimension(rows))
    z = torch.cat([model.one(x), model.two(x.flip(1))], 0).detach()
    assert table.methods["covariance"][group].uncentred == pytest.approx(approximate_dimension(z), rel=1e-9)


def test_trained_networks_fill_fewer_directions_on_their_data_than_in_weight_space() -> None:
    """Theory, section 8, on digits: naive ≫ centred covariance and activations > uncentred ones, which are near 2."""
    datasets = pytest.importorskip("sklearn.datasets")
    digits = datasets.load_digits()
    x, y = torch.tensor(digits.data / 16, dtype=torch.float32), torch.tensor(digits.target)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = mlp(64, 256, 1, 10)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.016, momentum=0.9)
    for _ in range(8):
        for k in torch.randperm(len(x), generator=generator(2)).split(64):
            optimiser.zero_grad()
            F.cross_entropy(model(x[k]), y[k]).backward()
            optimiser.step()
    found = {m: groups["layers.0"] for m, groups in dimension(model.eval(), [x]).methods.items()}
    for method in ("covariance", "activations"):
        assert 1 < found[method].uncentred < 3
        assert 4 < found[method].centred < 12
        assert found["weights-incoming"].uncentred > 2 * found[method].centred


def test_without_data_only_weights_are_measured() -> None:
    table = dimension(network(), args=examples(1))
    assert list(table.methods) == ["weights-incoming", "weights"]
    assert table.methods == dimension(network(), args=examples(1)).methods, "deterministic"


def test_a_given_spec_decides_the_groups() -> None:
    model, x = network(), examples()
    spec = discover(model, x[:1]).restrict(["layers.1"])
    assert list(dimension(model, [x], spec=spec).sizes) == ["layers.1"]
    assert dimension(model, [x], spec=SymmetrySpec({}, (), spec.shapes)).to_dict()["weights"] == {}


def test_degenerate_groups() -> None:
    """Equal units have dimension one and none after centring; zero matrices have none."""
    model = mlp(3, 4, 1, 1).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(0.5)
    found = dimension(model, [examples()[:, :3]])
    for method in METHODS[:2]:
        equal = found.methods[method]["layers.0"]
        assert equal.uncentred == pytest.approx(1.0)
        assert math.isnan(equal.centred)
    assert found.to_dict()["weights"]["layers.0"]["centred"] is None
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    zero = dimension(model, args=examples()[:1, :3]).methods["weights"]["layers.0"]
    assert all(math.isnan(value) for value in vars(zero).values())


def test_the_table_reads_and_converts() -> None:
    table = DimensionTable(
        {"weights": {"first": Dimension(3.25, 2.0, 1.5, 4.0), "b": Dimension(math.nan, 1.0, 1.0, 1.0)}},
        {"first": 8, "b": 2},
    )
    assert str(table).splitlines() == [
        "approximate dimension, uncentred / centred",
        "group  units          weights",
        "first      8        3.2 / 2.0",
        "b          2        nan / 1.0",
    ]
    assert table.to_dict()["weights"]["first"] == {
        "uncentred": 3.25,
        "centred": 2.0,
        "stable_rank": 1.5,
        "entropy_rank": 4.0,
    }
    assert table.to_dict()["weights"]["b"]["uncentred"] is None


def test_bad_input() -> None:
    with pytest.raises(DataError, match="needs example inputs"):
        dimension(network())
    with pytest.raises(ModelError, match="training mode"):
        dimension(nn.Sequential(nn.Linear(6, 4), nn.Dropout(), nn.Linear(4, 2)), args=examples(1))
    broken = network()
    with torch.no_grad():
        broken.layers[0].weight[0, 0] = math.nan
    with pytest.raises(CheckpointError, match="NaN or infinite"):
        dimension(broken, args=examples(1))
