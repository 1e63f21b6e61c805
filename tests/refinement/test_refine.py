"""Refinement on the path: never worse than the start, B's function kept, planted elements found, runs that repeat."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import isthmus
from isthmus.couplings import Monomial, Permutation
from isthmus.errors import (
    CheckpointError,
    DataError,
    IsthmusError,
    IsthmusWarning,
    ModelError,
    VerificationError,
)
from isthmus.matching import Alignment, Problem, SinglePass, Status, Then
from isthmus.networks import gpt
from isthmus.refinement import Elements, Refine, RefineSettings, refine, refined_method
from isthmus.symmetry import Acts, apply, random_element


def perceptron(seed: int, activation: type[nn.Module] = nn.ReLU, width: int = 16) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(6, width), activation(), nn.Linear(width, width), activation(), nn.Linear(width, 3)
    )


def examples(seed: int, count: int = 1200) -> tuple[Tensor, Tensor]:
    """Three classes by the largest of three sums: learnt in some steps, and not linear in the inputs."""
    x = torch.randn(count, 6, generator=torch.Generator().manual_seed(seed))
    return x, torch.stack([x[:, :2].prod(1), x[:, 2:4].prod(1), x[:, 4:].prod(1)]).argmax(0)


def batches(seed: int = 0, size: int = 100) -> list[tuple[Tensor, Tensor]]:
    x, y = examples(seed)
    return [(x[k : k + size], y[k : k + size]) for k in range(0, len(x), size)]


def trained(model: nn.Module, steps: int = 250) -> nn.Module:
    optimiser = torch.optim.Adam(model.parameters(), lr=0.02)
    for _, (x, y) in zip(range(steps), itertools.cycle(batches(size=100)), strict=False):
        optimiser.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimiser.step()
    return model.eval()


@pytest.fixture(scope="module")
def pair() -> tuple[nn.Module, nn.Module]:
    return trained(perceptron(0)), trained(perceptron(1))


@pytest.fixture(scope="module")
def start(pair: tuple[nn.Module, nn.Module]) -> Alignment:
    return isthmus.align(*pair, batches=batches(), method="correlation")


def barrier(a: nn.Module, b: nn.Module, alignment: Alignment | None, data: Any = None) -> float:
    return isthmus.line(a, b, batches(1) if data is None else data, alignment=alignment, bootstrap=0).barrier


def test_the_path_is_better_than_it_was_and_b_computes_the_same(
    pair: tuple[nn.Module, nn.Module], start: Alignment
) -> None:
    before = {n: t.clone() for n, t in pair[1].state_dict().items()}
    found = refine(*pair, start, batches(), steps=150)
    assert barrier(*pair, found) < 0.5 * barrier(*pair, start)
    assert found.sweeps[0] < max(found.sweeps)
    assert found.verification_error is not None
    assert found.verification_error < 1e-10
    assert found.kinds == {"Monomial": 2}
    assert found.status is Status.BUDGET
    assert any("5 % below" in note for note in found.notes)
    assert all(torch.equal(before[n], t) for n, t in pair[1].state_dict().items())
    for name, coupling in found.couplings.items():
        assert isinstance(coupling, Monomial)
        assert torch.equal(coupling.index, start.permutations[name])  # the order stays as it was found
        assert bool((coupling.factors > 0).all())


def test_a_search_that_makes_things_worse_returns_the_start(
    pair: tuple[nn.Module, nn.Module], start: Alignment
) -> None:
    found = refine(*pair, start, batches(), steps=20, rate=100.0, every=10)
    assert max(found.sweeps) == found.sweeps[0] > found.sweeps[-1]
    for name, coupling in found.couplings.items():
        assert isinstance(coupling, Monomial)
        assert bool((coupling.factors == 1).all())
        assert torch.equal(coupling.index, start.permutations[name])


def test_planted_factors_are_found() -> None:
    a = trained(perceptron(2)).double()
    data = [(x.double(), y) for x, y in batches()]
    spec = isthmus.discover(a, data[0][0])
    source = torch.Generator().manual_seed(3)
    planted = {n: random_element(Acts.POSITIVE, torch.arange(g.size), source) for n, g in spec.groups.items()}
    b = perceptron(0).double().eval()
    b.load_state_dict(apply(spec, planted, a.state_dict()))
    assert barrier(a, b, None, data) > 0.01
    found = refine(a, b, None, data, steps=250)
    assert barrier(a, b, found, data) < 1e-4
    assert found.verification_error is not None
    assert found.verification_error < 1e-12


def test_the_same_seed_gives_the_same_result(pair: tuple[nn.Module, nn.Module], start: Alignment) -> None:
    one, two, other = (refine(*pair, start, batches(), steps=30, seed=s, check=False) for s in (4, 4, 5))
    assert one.sweeps == two.sweeps
    assert one.sweeps != other.sweeps
    for name, coupling in one.couplings.items():
        assert torch.equal(coupling.matrix(), two.couplings[name].matrix())


class Stop(Exception):
    pass


class _Streamed:
    """Data that do not fit into memory."""

    def __init__(self, data: Any) -> None:
        self._data = data

    def __iter__(self) -> Any:
        return iter(self._data)


@pytest.mark.parametrize("streamed", [False, True])
def test_a_search_taken_up_again_ends_where_it_would_have(
    pair: tuple[nn.Module, nn.Module],
    start: Alignment,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    streamed: bool,
) -> None:
    if streamed:
        monkeypatch.setattr("isthmus.refinement._stream.held", _Streamed)
        monkeypatch.setattr("isthmus.refinement._stream.HELD_OUT", 200)
    whole = refine(*pair, start, batches(), steps=60, every=20, check=False)
    file = tmp_path / "search.safetensors"

    def interrupt(stage: str, done: int, total: int) -> None:
        if done >= 50:
            raise Stop

    with pytest.raises(Stop):
        refine(*pair, start, batches(), steps=60, every=20, check=False, state_file=file, on_stage=interrupt)
    assert file.exists()
    seen: list[int] = []
    again = refine(
        *pair, start, batches(), steps=60, every=20, check=False, state_file=file,
        on_stage=lambda stage, done, total: seen.append(done),
    )  # fmt: skip
    assert min(seen) > 30
    assert again.sweeps == whole.sweeps
    for name, coupling in whole.couplings.items():
        assert torch.equal(coupling.matrix(), again.couplings[name].matrix())
    done = refine(*pair, start, batches(), steps=60, every=20, check=False, state_file=file)
    assert done.sweeps == whole.sweeps
    with pytest.raises(CheckpointError, match="the state of another refinement"):
        refine(*pair, start, batches(), steps=61, every=20, check=False, state_file=file)


def test_state_files_of_other_kinds_are_refused(
    pair: tuple[nn.Module, nn.Module], start: Alignment, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=r"is written as \.safetensors"):
        refine(*pair, start, batches(), steps=1, state_file=tmp_path / "search.pt")
    file = tmp_path / "other.safetensors"
    start.save(file)
    with pytest.raises(CheckpointError, match="expected the state of a refinement"):
        refine(*pair, start, batches(), steps=1, state_file=file)


def test_moving_both_networks_is_moving_one(pair: tuple[nn.Module, nn.Module]) -> None:
    """The group acts linearly, so the path between ``h A`` and ``g B`` is ``h`` of that from ``A`` to ``h⁻¹ g B``."""
    a, b = (net.double().state_dict() for net in (perceptron(0), perceptron(1)))
    x = examples(0)[0].double()
    model = perceptron(0).double()
    spec = isthmus.discover(model, x[:4])
    source = torch.Generator().manual_seed(0)
    sizes = {name: group.size for name, group in spec.groups.items()}
    h, g = (
        {
            n: random_element(Acts.POSITIVE, torch.randperm(k, generator=source), source)
            for n, k in sizes.items()
        }
        for _ in range(2)
    )
    both = isthmus.interpolate(apply(spec, h, a), apply(spec, g, b), 0.3)
    one = isthmus.interpolate(a, apply(spec, {n: g[n].then(h[n].inverse()) for n in g}, b), 0.3)
    outputs = [torch.func.functional_call(model, state, (x,)) for state in (both, one)]
    torch.testing.assert_close(*outputs, rtol=1e-10, atol=1e-10)


def test_maps_between_linear_layers_are_learnt() -> None:
    def network(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 12), nn.ReLU(), nn.Linear(12, 3))

    a, b = (trained(network(seed), 80) for seed in (0, 1))
    found = refine(a, b, None, batches(), steps=80)
    assert found.kinds == {"Linear": 1, "Monomial": 1}
    assert found.verification_error is not None
    assert found.verification_error < 1e-10
    assert barrier(a, b, found) < 0.8 * barrier(a, b, None)


@pytest.mark.slow
def test_rotations_and_maps_of_a_folded_transformer_are_learnt() -> None:
    folded = [isthmus.fold(_language(seed), _tokens()[:1, :-1], untie=True) for seed in (0, 1)]
    a, b = (f.network().double().eval() for f in folded)
    text = _tokens()
    data = [(text[:, :-1], text[:, 1:])]
    spec = isthmus.discover(a, text[:1, :-1], ones=folded[0].folded_gains, zeros=folded[0].folded_biases)
    found = refine(a, b, None, data, spec=spec, steps=60, every=15)
    assert {"Rotation", "Linear"} <= set(found.kinds)
    assert found.verification_error is not None
    assert found.verification_error < 1e-10
    assert max(found.sweeps) > found.sweeps[0] + 0.1
    assert barrier(a, b, found, data) < barrier(a, b, None, data) - 0.1


def _tokens() -> Tensor:
    """Return counting sequences, which a transformer learns in some steps."""
    return (torch.arange(9) + torch.arange(32)[:, None]) % 8


def _language(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    model = gpt(10, 8, 1, 2, 8)
    text, optimiser = _tokens(), torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(60):
        optimiser.zero_grad()
        nn.functional.cross_entropy(model(text[:, :-1]).flatten(0, 1), text[:, 1:].flatten()).backward()
        optimiser.step()
    return model.eval()


def test_batch_norms_normalise_by_the_batch_and_are_left_alone() -> None:
    def network(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(6, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, 3))

    a, b = (trained(network(seed).train(), 80) for seed in (0, 1))
    kept = {n: t.clone() for n, t in a.state_dict().items()}
    start = isthmus.align(a, b, batches=batches(), method="correlation")
    found = refine(a, b, start, batches(), steps=80)
    data = {"test": batches(1), "train": batches()}
    assert barrier(a, b, found, data) < barrier(a, b, start, data)
    assert all(torch.equal(kept[n], t) for n, t in a.state_dict().items())
    assert found.verification_error is not None
    assert found.verification_error < 1e-10


def test_a_group_without_a_continuous_part_is_left_with_a_note() -> None:
    a, b = perceptron(0, nn.GELU), perceptron(1, nn.GELU)
    with pytest.warns(IsthmusWarning, match="nothing was refined"):
        found = refine(a, b, None, batches(), steps=3)
    assert any("nothing was refined" in note for note in found.notes)
    assert all(c == Permutation.identity(16) for c in found.couplings.values())


@pytest.mark.parametrize("name", ["mse", "own"])
def test_any_loss_is_refined(name: str) -> None:
    a, b = (trained(perceptron(seed), 60) for seed in (0, 1))
    data = [(x, nn.functional.one_hot(y, 3).float()) for x, y in batches()]

    def own(outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs.softmax(-1) - targets).square().sum(-1)

    loss = "mse" if name == "mse" else own
    found = refine(a, b, None, data, steps=60, loss=loss, rate=0.05, spread=1.0)
    assert max(found.sweeps) > found.sweeps[0]


def test_the_schedule_refines_what_the_one_before_it_found(pair: tuple[nn.Module, nn.Module]) -> None:
    problem = Problem(*pair, batches=batches())
    schedule = Then(SinglePass(), Refine(problem, RefineSettings(steps=40)))
    found = isthmus.align(*pair, batches=batches(), method="correlation", schedule=schedule)
    by_method = isthmus.align(
        *pair, batches=batches(), method=refined_method(settings=RefineSettings(steps=40))
    )
    assert found.kinds == by_method.kinds == {"Monomial": 2}
    assert by_method.method == "correlation-refined"
    for name, coupling in found.couplings.items():
        torch.testing.assert_close(coupling.matrix(), by_method.couplings[name].matrix())
    assert found.verification_error is not None
    assert found.verification_error < 1e-10


def test_refined_alignments_are_stored_and_read(
    pair: tuple[nn.Module, nn.Module], start: Alignment, tmp_path: Path
) -> None:
    found = refine(*pair, start, batches(), steps=5)
    found.save(tmp_path / "refined.safetensors")
    read = Alignment.load(tmp_path / "refined.safetensors")
    assert read.settings["refinement"] == found.settings["refinement"]
    assert read.method == "correlation, refined"
    assert barrier(*pair, read) == barrier(*pair, found)


def test_seconds_end_a_search(pair: tuple[nn.Module, nn.Module], start: Alignment) -> None:
    found = refine(*pair, start, batches(), seconds=0.3, every=1000, check=False)
    assert 0 < found.settings["refinement"]["taken"] < 10_000


@pytest.mark.parametrize("option", ["steps", "seconds", "rate", "every"])
def test_numbers_out_of_range_are_refused(option: str) -> None:
    with pytest.raises(DataError, match=f"expected {option} above 0, found -1"):
        RefineSettings(**{option: -1})


def test_a_spread_beyond_the_path_is_refused() -> None:
    with pytest.raises(DataError, match="expected spread from 0 to 1, found 2"):
        RefineSettings(spread=2)


def test_bad_input_is_refused(pair: tuple[nn.Module, nn.Module], start: Alignment) -> None:
    with pytest.raises(DataError, match="not both"):
        refine(*pair, start, batches(), spec=start.spec)
    with pytest.raises(DataError, match="no targets"):
        refine(*pair, start, [x for x, _ in batches()], steps=1)
    with pytest.raises(DataError, match="at least two examples"):
        refine(*pair, start, [(torch.zeros(1, 6), torch.zeros(1).long())], steps=1)
    with pytest.raises(DataError, match="the name or position of the one output"):
        refine(*pair, start, batches(), steps=1, outputs=[])
    with pytest.raises(ModelError, match="on held-out batches is nan"):
        refine(*pair, start, [(x * float("nan"), y) for x, y in batches()], steps=1, check=False)
    with pytest.raises(IsthmusError, match="the wrong way round"):
        refine(pair[1], pair[0], start, batches(), steps=1)


def test_data_that_are_all_held_out_are_refused(
    pair: tuple[nn.Module, nn.Module], start: Alignment, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("isthmus.refinement._stream.held", _Streamed)
    with pytest.raises(DataError, match="all 12 batches are held out"):
        refine(*pair, start, batches(), steps=1, check=False)


class Remembers(nn.Module):
    """Multiplies by what it laid out when it was last told to evaluate."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 3)
        self.kept = self.last.weight.detach().clone()

    def train(self, mode: bool = True) -> Remembers:
        super().train(mode)
        self.kept = self.last.weight.detach().clone()
        return self

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(self.first(x).relu(), self.kept)


def test_networks_that_compute_with_copies_are_refused() -> None:
    torch.manual_seed(0)
    with pytest.raises(ModelError, match="computes with tensors that it keeps besides"):
        refine(Remembers().eval(), Remembers().eval(), None, batches(), steps=1, check=False)


def test_a_changed_function_is_refused(
    pair: tuple[nn.Module, nn.Module], start: Alignment, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Problem, "function_change", lambda self, at: 0.5)
    with pytest.raises(VerificationError, match="Refining changed the function of B"):
        refine(*pair, start, batches(), steps=1)


def test_a_loss_that_becomes_infinite_ends_the_search(
    pair: tuple[nn.Module, nn.Module], start: Alignment
) -> None:
    calls = itertools.count()

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        found = nn.functional.cross_entropy(outputs, targets, reduction="none")
        return found * float("inf") if outputs.requires_grad and next(calls) == 3 else found

    found = refine(*pair, start, batches(), steps=20, loss=loss, check=False)
    assert found.settings["refinement"]["taken"] == 3
    assert any("the search ended there" in note for note in found.notes)


@pytest.mark.parametrize("acts", [Acts.MEAN_FIXING, Acts.ORTHOGONAL, Acts.GENERAL])
def test_elements_stay_in_their_class(acts: Acts) -> None:
    elements = Elements.of({"g": acts}, {"g": 5}, torch.device("cpu"))
    source = torch.Generator().manual_seed(0)
    for _ in range(200):
        with torch.no_grad():
            for tangent in elements.tangents:
                tangent.copy_(0.3 * torch.randn(tangent.shape, generator=source, dtype=torch.float64))
        elements.move()
    matrix = elements.values()["g"].matrix()
    assert float((matrix - torch.eye(5)).abs().max()) > 0.5
    if acts is Acts.GENERAL:
        assert 10 < float(torch.linalg.cond(matrix)) < 1e5
        return
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(5).double(), rtol=0, atol=1e-12)
    if acts is Acts.MEAN_FIXING:
        torch.testing.assert_close(matrix.sum(1), torch.ones(5).double(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("acts", [Acts.POSITIVE, Acts.MEAN_FIXING, Acts.ORTHOGONAL, Acts.GENERAL])
def test_gradients_are_those_of_the_exponential(acts: Acts) -> None:
    """Compared with differences of the loss after a move by a small tangent."""
    elements = Elements.of({"g": acts}, {"g": 4}, torch.device("cpu"))
    source = torch.Generator().manual_seed(1)
    (tangent,) = elements.tangents
    weights = torch.randn(2, 4, 3, generator=source, dtype=torch.float64)

    def value() -> Tensor:
        coupling = elements.couplings(torch.float64)["g"]
        return (coupling.carry(weights[0]) * coupling.carry_readers(weights[1])).sum() + coupling.carry(
            weights[1]
        ).sin().sum()

    with torch.no_grad():
        tangent.copy_(0.2 * torch.randn(tangent.shape, generator=source, dtype=torch.float64))
    elements.move()
    (gradient,) = torch.autograd.grad(value(), tangent)
    direction = torch.randn(tangent.shape, generator=source, dtype=torch.float64)
    kept = elements.tensors()
    values = []
    for step in (1e-5, -1e-5):
        elements.put(kept)
        with torch.no_grad():
            tangent.copy_(step * direction)
        elements.move()
        values.append(float(value().detach()))
    assert (values[0] - values[1]) / 2e-5 == pytest.approx(float((gradient * direction).sum()), rel=1e-6)
