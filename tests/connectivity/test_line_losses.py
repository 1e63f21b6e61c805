"""Losses on a line: by tokens, in the user's own batches, and as networks compute them."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from isthmus.batches import Batch
from isthmus.connectivity import interpolate, line
from isthmus.connectivity._barrier import bootstrap_means
from isthmus.errors import DataError, IsthmusWarning
from isthmus.evaluation import bind, evaluate

sys.path.insert(0, str(Path(__file__).parents[1] / "losses"))


def seeded(factory: Any, seed: int) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return factory().double().eval()


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 3))


class Tagger(nn.Module):
    """Classes of tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(11, 6), nn.Linear(6, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.embed(tokens).relu())


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def padded(seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    """Two batches of padded text of different length."""
    generator = torch.Generator().manual_seed(seed)
    data = []
    for size, length in ((7, 6), (3, 9)):
        tokens = torch.randint(11, (size, length), generator=generator)
        labels = torch.randint(3, (size, length), generator=generator)
        lengths = torch.randint(0, length + 1, (size,), generator=generator)
        labels[torch.arange(length) >= lengths[:, None]] = -100
        data.append((tokens, labels))
    return data


@pytest.mark.parametrize("points", [5, "adaptive"])
def test_padded_text_counts_tokens(points: Any) -> None:
    a, b, data = seeded(Tagger, 0), seeded(Tagger, 1), padded()
    found = line(a, b, data, points=points)
    assert found.settings["evaluation"] == "traced"
    assert found.accuracy is not None
    kept = torch.cat([y.flatten() for _, y in data]) != -100
    labels = torch.cat([y.flatten() for _, y in data])[kept]
    for t, loss, right, error in zip(
        found.ts.tolist(),
        found.loss.tolist(),
        found.accuracy.tolist(),
        found.lmc_error.tolist(),
        strict=True,
    ):
        run = bind(a, interpolate(a, b, t))
        outputs = [run(Batch((x,))) for x, _ in data]
        logits = torch.cat([o.flatten(0, 1) for o in outputs])[kept]
        assert loss == pytest.approx(float(F.cross_entropy(logits, labels)), rel=1e-10)
        assert right == pytest.approx(float((logits.argmax(1) == labels).double().mean()))
        f_a, f_b = (torch.cat([bind(m)(Batch((x,))).flatten(0, 1) for x, _ in data])[kept] for m in (a, b))
        gap = (logits - torch.lerp(f_a, f_b, t)).norm(dim=1).mean()
        assert error == pytest.approx(float(gap), rel=1e-9, abs=1e-12)
    middle = torch.cat([((a(x) + b(x)) / 2).flatten(0, 1) for x, _ in data]).detach()[kept]
    assert found.ensemble_loss == pytest.approx(float(F.cross_entropy(middle, labels)), rel=1e-10)
    assert found.unit == "nats per position"
    assert found.curve.examples == 10


def test_standard_errors_of_a_mean_over_tokens() -> None:
    """The bootstrap agrees with the formula of the ratio estimator, which knows that the counts vary too."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(11, (300, 8), generator=generator)
    labels = torch.randint(3, (300, 8), generator=generator)
    labels[torch.arange(8) >= torch.randint(0, 9, (300, 1), generator=generator)] = -100
    a = seeded(Tagger, 0)
    found = line(a, seeded(Tagger, 1), [(tokens, labels)], points=3, bootstrap=2000)
    with torch.no_grad():
        values = F.cross_entropy(a(tokens).movedim(-1, 1), labels, reduction="none").sum(1)
    counts = (labels != -100).sum(1).double()
    used = counts > 0
    residuals = (values - float(found.loss[0]) * counts)[used]
    wanted = residuals.std() / used.sum() ** 0.5 / counts[used].mean()
    assert float(found.curve.loss_error[0]) == pytest.approx(float(wanted), rel=0.06)  # type: ignore[index]
    plain = (values / counts)[used].std() / used.sum() ** 0.5
    assert abs(float(plain) / float(wanted) - 1) > 0.1  # what a mean of means would give is another number


def test_weighted_bootstrap_by_hand() -> None:
    rows = torch.tensor([[1.0, 5.0, 2.0]]).double()
    weights = torch.tensor([[1.0, 0.0, 3.0]]).double()
    found = bootstrap_means(rows, 400, torch.Generator().manual_seed(0), weights)
    assert {round(v, 6) for v in found[:, 0].tolist()} == {1.0, 1.6, 1.75, 1.857143, 2.0}
    assert float(found.min()) == 1.0  # never the value that does not count
    assert float(found.max()) == 2.0


def contrastive(outputs: Tensor, targets: Tensor) -> Tensor:
    """Each example against the others of its batch."""
    similar = outputs @ outputs.T / 3
    return F.cross_entropy(similar - 9 * torch.eye(len(outputs)), targets % len(outputs), reduction="none")


def mean_contrastive(outputs: Tensor, targets: Tensor) -> tuple[Tensor, int]:
    return contrastive(outputs, targets).mean() * len(outputs), len(outputs)


@pytest.mark.parametrize("loss", [contrastive, mean_contrastive])
@pytest.mark.parametrize("sizes", [(4, 4, 4), (7, 2, 3), (1, 11), (12,)])
@pytest.mark.parametrize("points", [3, "adaptive"])
def test_a_loss_that_compares_examples_gets_the_batches_as_they_come(
    loss: Any, sizes: tuple[int, ...], points: Any
) -> None:
    a, b = seeded(mlp, 0), seeded(mlp, 1)
    x, y = draw(12, 4), torch.arange(12)
    data = list(zip(x.split(sizes), y.split(sizes), strict=True))
    seen: list[int] = []

    def watched(outputs: Tensor, targets: Tensor) -> Any:
        seen.append(len(outputs))
        return loss(outputs, targets)

    found = line(a, b, data, points=points, loss=watched)
    assert found.settings["evaluation"] == "traced"
    for t, value in zip(found.ts.tolist(), found.loss.tolist(), strict=True):
        run = bind(a, interpolate(a, b, t))
        each = torch.cat([contrastive(run(Batch((u,))), v) for u, v in data])
        assert value == pytest.approx(float(each.mean()), rel=1e-10)
    assert set(seen) == set(sizes)
    assert found.curve.examples == 12


class Centred(nn.Module):
    """A network whose outputs depend on the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp()

    def forward(self, x: Tensor) -> Tensor:
        outputs = self.net(x)
        return outputs - outputs.mean(0)


@pytest.mark.parametrize("sizes", [(1, 5, 6), (6, 6)])
def test_a_network_that_compares_examples_gets_the_batches_as_they_come(sizes: tuple[int, ...]) -> None:
    """Also where the first batch, of one example, cannot show it."""
    a, b = seeded(Centred, 0), seeded(Centred, 1)
    x, y = draw(12, 4), torch.arange(12) % 3
    data = list(zip(x.split(sizes), y.split(sizes), strict=True))
    found = line(a, b, data, points=3)
    for t, value in zip(found.ts.tolist(), found.loss.tolist(), strict=True):
        assert value == pytest.approx(evaluate(a, data, state=interpolate(a, b, t)).loss, rel=1e-10)


class Heads(nn.Module):
    """Logits and features."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        hidden = self.body(x).relu()
        return {"hidden": hidden, "logits": self.head(hidden)}


def test_a_function_of_all_outputs_and_of_any_targets() -> None:
    a, b = seeded(Heads, 0), seeded(Heads, 1)
    x, y = draw(8, 4), torch.arange(8) % 3
    data = [(x[:5], {"y": y[:5], "w": [torch.ones(5)]}), (x[5:], {"y": y[5:], "w": [torch.ones(3)]})]

    def loss(outputs: dict[str, Tensor], targets: dict[str, Any]) -> Tensor:
        lost = F.cross_entropy(outputs["logits"], targets["y"], reduction="none")
        return lost * targets["w"][0] + outputs["hidden"].square().mean(-1)

    found = line(a, b, data, points=3, loss=loss)
    for t, value in zip(found.ts.tolist(), found.loss.tolist(), strict=True):
        run = bind(a, interpolate(a, b, t), read=lambda output: output)
        each = torch.cat([loss(run(Batch((u,))), v) for u, v in data])
        assert value == pytest.approx(float(each.mean()), rel=1e-10)
    with torch.no_grad():
        f_a, f_b = a(x), b(x)
        middle = {k: (f_a[k] + f_b[k]) / 2 for k in f_a}
        wanted = loss(middle, {"y": y, "w": [torch.ones(8)]}).mean()
    assert found.ensemble_loss == pytest.approx(float(wanted), rel=1e-10)
    gap = bind(a, interpolate(a, b, 0.5))(Batch((x,))) - middle["logits"]
    assert float(found.lmc_error[1]) == pytest.approx(float(gap.norm(dim=1).mean()), rel=1e-9)


def test_options_of_losses_reach_the_line() -> None:
    a, b = seeded(Tagger, 0), seeded(Tagger, 1)
    weights = torch.tensor([0.5, 1.0, 4.0])
    data = [(x, y.where(y != -100, 255)) for x, y in padded()]
    loss = nn.CrossEntropyLoss(weight=weights, ignore_index=255, label_smoothing=0.1)
    text = "cross_entropy(weight=[0.5, 1.0, 4.0], ignore_index=255, label_smoothing=0.1)"
    with torch.no_grad():
        logits = torch.cat([a(x).flatten(0, 1) for x, _ in data])
        wanted = nn.CrossEntropyLoss(weights.double(), ignore_index=255, label_smoothing=0.1)(
            logits, torch.cat([y.flatten() for _, y in data])
        )
    for chosen in (loss, text):
        found = line(a, b, data, points=3, loss=chosen)
        assert float(found.loss[0]) == pytest.approx(float(wanted), rel=1e-10)
    assert found.settings["loss"] == text


def test_labels_that_are_all_ignored_are_refused() -> None:
    a, b = seeded(Tagger, 0), seeded(Tagger, 1)
    tokens = torch.zeros(4, 3, dtype=torch.int64)
    with pytest.raises(
        DataError, match="The loss on 'test' is a mean over nothing: every label is one that is ignored"
    ):
        line(a, b, {"test": [(tokens, torch.full((4, 3), -100))]})


def test_a_generator_that_was_read_is_named() -> None:
    a = seeded(mlp, 0)
    generator: Iterator[Any] = ((draw(2, 4), torch.tensor([0, 1])) for _ in range(2))
    line(a, a, generator, points=3)
    with pytest.raises(DataError, match=r"data: .*can be read once only and has perhaps been read before"):
        line(a, a, generator, points=3)


def pair(title: str) -> tuple[Any, Any, Any]:
    pytest.importorskip("transformers")
    from test_own_losses import BY_TITLE, tasks  # type: ignore[import-not-found]

    task = BY_TITLE[title]
    return task, [tasks.network(task, seed) for seed in (0, 1)], tasks


TITLES = (
    "causal language model",
    "sequence to sequence",
    "question answering",
    "image and text, softmax",
    "segmentation",
    "two heads at once",
)


@pytest.mark.parametrize("title", TITLES)
@pytest.mark.filterwarnings("ignore::isthmus.errors.IsthmusWarning")
def test_networks_of_transformers_are_measured_by_their_own_loss(title: str) -> None:
    task, (a, b), tasks = pair(title)
    data = tasks.batches(task)[:1]
    found = line(a, b, iter(data), points=3, refresh=None)
    for t, value in zip(found.ts.tolist(), found.loss.tolist(), strict=True):
        middle = tasks.network(task)
        middle.load_state_dict(interpolate(a, b, t))
        assert value == pytest.approx(tasks.own_loss(middle, task, data[0]), rel=2e-6)
    assert found.settings["loss"] == f"model ({task.convention})"
    assert json.loads(json.dumps(found.to_dict(), allow_nan=False))["notes"] == list(found.notes)
    if task.convention == "by batch":
        assert found.ensemble_loss is found.accuracy is None
        assert "–" in str(found)
        assert "Note: The loss is BertForPreTraining's own" in str(found)
        with pytest.warns(IsthmusWarning, match="one number for each batch"):
            line(a, b, data, points=2)
    else:
        assert found.ensemble_loss is not None
        assert not any("one number for each batch" in note for note in found.notes)
    if title == "causal language model":  # random weights
        assert "network A is near chance: loss" in found.notes[0]


def test_the_barrier_of_a_causal_model_is_seen() -> None:
    """Two networks that have learned a text have a barrier between them, which labels without the shift hide."""
    task, (a, b), tasks = pair("causal language model")
    batch = tasks.batches(task)[0]
    for model in (a, b):
        optimiser = torch.optim.Adam(model.parameters(), 0.03)
        for _ in range(40):
            optimiser.zero_grad()
            model(**batch).loss.backward()
            optimiser.step()
    found = line(a, b, [batch], points=5)
    ends = [tasks.own_loss(model, task, batch) for model in (a, b)]
    assert found.curve.endpoint_losses == pytest.approx(ends, rel=1e-5)
    assert max(ends) < 0.5
    assert found.barrier > 1.0
    assert found.curve.endpoint_accuracies == pytest.approx((1.0, 1.0), abs=0.05)
