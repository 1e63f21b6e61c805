"""Policy ``constant_units="weights"``: what activations leave open is decided by weights, and nothing else moves."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from isthmus import align, apply, discover
from isthmus.matching import CONSTANT_UNITS
from isthmus.matching._constant import _open_pairs
from isthmus.testing import mlp, planted_pair, randomise_state


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def network(seed: int, dead: tuple[int, ...], depth: int = 1) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = randomise_state(mlp(5, 8, depth, 3), generator(seed)).eval()
    with torch.no_grad():
        for layer in list(model.layers)[:-1]:
            layer.bias.clamp_(min=0.5)
            layer.bias[list(dead)] = -12.0
    return model


def examples() -> Tensor:
    return torch.randn(200, 5, generator=generator(9))


@pytest.mark.parametrize("method", ["activations", "correlation"])
@pytest.mark.parametrize(
    ("dead_a", "dead_b"), [((1, 4), (0, 6)), ((1, 4), (2,)), ((3,), (0, 5, 6)), ((), (2,))]
)
def test_only_open_pairs_move_and_they_follow_the_weights(
    method: str, dead_a: tuple[int, ...], dead_b: tuple[int, ...]
) -> None:
    a, b, x = network(0, dead_a), network(1, dead_b), examples()
    found = align(a, b, batches=[x], method=method)
    p = found.permutations["layers.0"].tolist()
    ha, hb = (torch.relu(m.layers[0](x)).detach().double() for m in (a, b))
    ca, cb = ha - ha.mean(0), hb - hb.mean(0)
    gain = ca.T @ cb / len(x)
    if method == "correlation":
        norm = ca.square().mean(0).sqrt()[:, None] * cb.square().mean(0).sqrt()
        gain = torch.where(norm > 0, gain / norm.clamp(min=1e-30), 0.0)
    from scipy.optimize import linear_sum_assignment

    best = gain.numpy()[linear_sum_assignment(gain.numpy(), maximize=True)].sum()
    assert float(gain[torch.arange(8), p].sum()) == pytest.approx(best, rel=1e-6)
    # No exchange of two open partners improves the weights.
    sa, sb = ({k: v.double() for k, v in m.state_dict().items()} for m in (a, b))
    weights = (
        sa["layers.0.weight"] @ sb["layers.0.weight"].T
        + torch.outer(sa["layers.0.bias"], sb["layers.0.bias"])
        + sa["layers.1.weight"].T @ sb["layers.1.weight"]
    )
    is_open = [i for i in range(8) if i in dead_a or p[i] in dead_b]
    for i in is_open:
        for k in is_open:
            alive = (i not in dead_a and p[k] not in dead_b) or (k not in dead_a and p[i] not in dead_b)
            if not alive:
                assert weights[i, p[i]] + weights[k, p[k]] >= weights[i, p[k]] + weights[k, p[i]] - 1e-9
    (note,) = found.notes
    assert (
        f"{len(dead_a)} units of A and {len(dead_b)} of B never vary: A {list(dead_a)}, B {list(dead_b)}"
        in note
    )
    assert found.settings["constant_units"] == CONSTANT_UNITS == "weights"


@pytest.mark.parametrize("method", ["activations", "correlation"])
def test_dead_units_of_neighbouring_layers_are_recovered(method: str) -> None:
    a, x = network(0, (1, 4, 6), depth=3), examples()
    spec = discover(a, x[:1])
    pair = planted_pair(a, spec, 0.01, generator(3))
    found = align(a, pair.state_b, batches=[x], method=method, spec=spec)
    for group, truth in pair.permutations.items():
        assert torch.equal(found.permutations[group], truth), group


@pytest.mark.parametrize("method", ["activations", "correlation"])
def test_the_numbering_of_b_plays_no_part(method: str) -> None:
    a, b, x = network(0, (1, 4, 6), depth=2), network(1, (2, 3), depth=2), examples()
    spec = discover(a, x[:1])
    found = align(a, b, batches=[x], method=method, spec=spec)
    renumbering = {name: torch.randperm(8, generator=generator(7)) for name in spec.groups}
    renumbered = apply(spec, renumbering, b.state_dict())
    again = align(a, renumbered, batches=[x], method=method, spec=spec)
    one, other = found.apply(b.state_dict()), again.apply(renumbered)
    assert all(torch.equal(v, other[k]) for k, v in one.items())


def test_a_layer_of_dead_units_only() -> None:
    a, b = network(0, tuple(range(8))), network(1, tuple(range(8)))
    found = align(a, b, batches=[examples()], method="activations")
    by_weights = align(a, b, args=examples()[:1], method="weights")
    assert torch.equal(found.permutations["layers.0"], by_weights.permutations["layers.0"])


def test_open_pairs() -> None:
    permutation = torch.tensor([2, 0, 1, 3])
    allowed = _open_pairs(permutation, torch.tensor([0]), torch.tensor([3]))
    # Unit 0 of A is dead and holds 2; unit 3 of A lives and holds 3, which is dead.
    assert allowed.int().tolist() == [[0, 0, 1, 1], [1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 1]]


@pytest.mark.parametrize("method", ["activations", "correlation"])
def test_gains_of_open_units_alone_give_what_whole_matrices_give(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b, x = network(0, (1, 4, 6), depth=3), network(1, (2, 3), depth=3), examples()
    found = align(a, b, batches=[x], method=method)
    monkeypatch.setattr("isthmus.matching._constant.parts_of", lambda *_: None)
    whole = align(a, b, batches=[x], method=method)
    assert all(torch.equal(p, whole.permutations[g]) for g, p in found.permutations.items())
