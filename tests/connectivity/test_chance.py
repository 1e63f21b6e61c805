"""Endpoints near chance are named: their barrier means nothing. Better networks are left in peace."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from torch import Tensor, nn

from isthmus import line
from isthmus.batches import Batch
from isthmus.connectivity._chance import TargetTally, chance_note
from isthmus.errors import IsthmusWarning
from isthmus.losses import Scores
from isthmus.losses._conventions import _contrastive, _pairwise

CLASSES = 5


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def labels(count: int, shares: tuple[float, ...] = (0.2,) * CLASSES) -> Tensor:
    return torch.multinomial(torch.tensor(shares), count, replacement=True, generator=generator(1))


class Reading(nn.Module):
    """Knows the label of a share of the examples, which the input carries; else says what it is told to."""

    def __init__(self, sharpness: float, constant: Tensor | None = None) -> None:
        super().__init__()
        self.sharpness = nn.Parameter(torch.tensor(sharpness))
        self.constant = nn.Parameter(torch.zeros(CLASSES) if constant is None else constant)

    def forward(self, x: Tensor) -> Tensor:
        return self.sharpness * x + self.constant


def data(
    known: float, count: int = 400, shares: tuple[float, ...] = (0.2,) * CLASSES
) -> tuple[Tensor, Tensor]:
    """One-hot labels as inputs, of which only a share is true."""
    y = labels(count, shares)
    seen = torch.where(torch.rand(count, generator=generator(2)) < known, y, labels(count, shares).roll(1))
    return nn.functional.one_hot(seen, CLASSES).float(), y


def noted(a: nn.Module, b: nn.Module, batch: tuple[Tensor, Tensor], **options: object) -> tuple[str, ...]:
    """Return the notes of a line, each of which must be a warning too."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = line(a.eval(), b.eval(), {"test": [batch]}, points=3, bootstrap=0, **options)  # type: ignore[arg-type]
    told = tuple(str(w.message) for w in caught if issubclass(w.category, IsthmusWarning))
    assert told == found.notes
    assert found.to_dict()["notes"] == list(found.notes)
    assert all(f"Note: {note}" in str(found) for note in found.notes)
    return found.notes


def test_a_network_that_guesses_is_named_and_the_other_is_not() -> None:
    (note,) = noted(Reading(0.0), Reading(3.0), data(0.9))
    assert note.startswith("On 'test' network A is near chance: loss 1.609, 1.60")
    assert "accuracy" in note
    assert "for the most frequent class" in note
    assert "network B" not in note
    assert "A barrier between networks at chance means nothing. Are the inputs normalised" in note


def test_both_ends() -> None:
    (note,) = noted(Reading(0.0), Reading(0.1), data(0.0))
    assert "network A is near chance" in note
    assert "network B is near chance" in note


@pytest.mark.parametrize("known", [0.4, 0.6, 0.9, 1.0])
def test_networks_that_have_learned_something_are_left_in_peace(known: float) -> None:
    assert noted(Reading(1.1), Reading(2.0) if known > 0.5 else Reading(1.2), data(known)) == ()


def test_an_accuracy_above_chance_that_gains_little_is_near_chance() -> None:
    """13 % where the most frequent class has 10 %, significantly so: images on another scale than in training."""
    (note,) = noted(Reading(2.5), Reading(2.5), data(0.04, 20_000))
    assert "network A is near chance" in note


def test_a_frequent_class_is_no_skill() -> None:
    shares = (0.9, 0.04, 0.03, 0.02, 0.01)
    constant = torch.tensor(shares).log()
    (note,) = noted(Reading(0.0, constant), Reading(3.0, constant), data(0.9, 600, shares))
    assert "network A is near chance" in note
    assert "network B" not in note


def test_a_calibrated_network_on_rare_classes_is_left_in_peace() -> None:
    """Its accuracy is that of the most frequent class, its loss is well below the constant's."""
    shares = (0.9, 0.04, 0.03, 0.02, 0.01)
    constant = torch.tensor(shares).log()
    assert noted(Reading(1.5, constant), Reading(1.5, constant), data(0.9, 2000, shares)) == ()


def test_an_overconfident_network_is_called_so() -> None:
    (note,) = noted(Reading(40.0), Reading(2.0), data(0.7))
    assert "network A is overconfident: loss" in note
    assert "A barrier in this loss says little." in note
    assert "means nothing" not in note


def test_regression_against_the_variance_of_the_targets() -> None:
    x = torch.randn(300, 3, generator=generator())
    y = x @ torch.tensor([[1.0, 0.0], [0.0, 2.0], [0.0, 0.0]]) + torch.tensor([5.0, -3.0])
    good, mean = nn.Linear(3, 2), nn.Linear(3, 2)
    with torch.no_grad():
        for layer, weight in ((good, [[0.9, 0.0, 0.0], [0.0, 1.9, 0.0]]), (mean, [[0.0] * 3] * 2)):
            layer.weight.copy_(torch.tensor(weight))
            layer.bias.copy_(torch.tensor([5.0, -3.0]))
    (note,) = noted(good, mean, (x, y), loss="mse")
    variance = float(y.var(0, correction=0).mean())
    assert f"network B is near chance: loss {variance:.2g}"[:-1] in note
    assert "network A" not in note
    assert noted(good, good, (x, y), loss="mse") == ()


def test_yes_or_no_against_the_share_of_yes() -> None:
    x = torch.randn(300, 2, generator=generator())
    y = (x > torch.tensor([0.0, 1.0])).float()
    good, constant = nn.Linear(2, 2), nn.Linear(2, 2)
    share = y.mean(0)
    with torch.no_grad():
        good.weight.copy_(torch.eye(2) * 6)
        good.bias.copy_(torch.tensor([0.0, -6.0]))
        constant.weight.zero_()
        constant.bias.copy_(share.logit())
    (note,) = noted(good, constant, (x, y), loss="bce")
    entropy = float(-(share * share.log() + (1 - share) * (1 - share).log()).mean())
    assert f"network B is near chance: loss {entropy:.3g}" in note
    assert f"{100 * float(torch.maximum(share, 1 - share).mean()):.1f}%" in note
    assert "network A" not in note
    assert noted(good, good, (x, y), loss="bce") == ()


def test_a_loss_of_ones_own_is_judged_by_accuracy() -> None:
    def hinge(outputs: Tensor, targets: Tensor) -> Tensor:
        return nn.functional.multi_margin_loss(outputs, targets, reduction="none")

    (note,) = noted(Reading(0.0), Reading(3.0), data(0.9), loss=hinge)
    assert "network A is near chance: accuracy" in note
    assert "constant prediction" not in note


def test_one_class_alone_says_nothing() -> None:
    x, y = torch.randn(40, CLASSES, generator=generator()), torch.zeros(40, dtype=torch.int64)
    assert noted(Reading(1.0), Reading(2.0), (x, y)) == ()


def test_labels_count_alike_as_in_the_loss() -> None:
    tally = TargetTally("cross_entropy")
    tally.update(torch.zeros(2, 3, 2), torch.tensor([[0, 1, 1], [1, -100, -100]]))
    constant = tally.constant()
    assert constant is not None
    assert constant.accuracy == pytest.approx(3 / 4)  # three of the four labels that count
    p = torch.tensor([1 / 4, 3 / 4])
    assert constant.loss == pytest.approx(float(-(p * p.log()).sum()))


def test_the_constant_of_cut_data_is_that_of_the_whole() -> None:
    y = torch.randn(50, 4, generator=generator()).double() + 1e6
    whole, parts = TargetTally("mse"), TargetTally("mse")
    whole.update(y, y)
    for part in y.split(7):
        parts.update(part, part)
    for tally in (whole, parts):
        constant = tally.constant()
        assert constant is not None
        assert constant.loss == pytest.approx(float(y.var(0, correction=0).mean()), rel=1e-6)
    parts.update(y[:, :2], y[:, :2])  # targets of another length: not known
    assert parts.constant() is None


def test_what_is_no_label_is_not_judged() -> None:
    tally = TargetTally("cross_entropy")
    tally.update(torch.zeros(2, 3), torch.rand(2, 3))
    assert tally.constant() is None
    tally = TargetTally("cross_entropy")
    tally.update(torch.zeros(2, 3), {"labels": torch.zeros(2)})
    assert tally.constant() is None


def test_units_are_those_of_the_loss() -> None:
    def hinge(outputs: Tensor, targets: Tensor) -> Tensor:
        return nn.functional.multi_margin_loss(outputs, targets, reduction="none")

    x, y = data(0.9)
    net = Reading(3.0).eval()
    for loss, targets, unit in (
        ("cross_entropy", y, "nats per example"),
        ("mse", x, "squared error"),
        (hinge, y, "hinge"),
    ):
        found = line(net, net, [(x, targets)], points=2, bootstrap=0, loss=loss)
        assert found.unit == found.to_dict()["unit"] == unit
        assert f"losses in {unit};" in str(found)
    assert math.isfinite(found.barrier)


def scored(losses: list[float], right: list[float]) -> Scores:
    ones = torch.ones(len(losses), dtype=torch.float64)
    return Scores(torch.tensor(losses).double(), ones, torch.tensor(right).double(), ones)


@pytest.mark.parametrize("kind", ["contrastive", "pairwise"])
def test_pairs_in_a_batch_against_choosing_at_random(kind: str) -> None:
    tally, sizes = TargetTally(kind), (8, 4)
    scores = {"contrastive": _contrastive, "pairwise": _pairwise}[kind]
    wanted = []
    for size in sizes:
        tally.update(torch.zeros(size, size), None)
        same = torch.full(
            (size, size), math.log(1 / size) - math.log(1 - 1 / size)
        )  # the best constant logit
        wanted += scores(same, Batch()).losses.tolist()
    constant = tally.constant()
    assert constant is not None
    assert constant.loss == pytest.approx(sum(wanted) / 12)
    assert constant.accuracy == pytest.approx(2 / 12)
    poor, good = scored([constant.loss] * 12, [1, 0] + [0] * 10), scored([0.1] * 12, [1] * 12)
    note = chance_note("data", constant, (poor, good))
    assert note is not None
    assert "network A is near chance" in note
    assert "16.7% for choosing in the batch at random" in note
    assert "network B" not in note
    assert chance_note("data", constant, (good, good)) is None
    one = TargetTally(kind)
    one.update(torch.zeros(1, 1), None)
    assert one.constant() is None


def test_spans_against_the_shares_of_their_ends() -> None:
    tally = TargetTally("spans")
    tally.update(torch.zeros(3, 9, 2), torch.tensor([[0, 4], [0, 4], [2, 4]]))
    tally.update(torch.zeros(2, 5, 2), torch.tensor([[0, 3], [-1, -1]]))  # the last lies behind the text
    constant = tally.constant()
    assert constant is not None
    h = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert constant.loss == pytest.approx((h + h) / 2)
    assert constant.accuracy == pytest.approx(1 / 2)
    note = chance_note("data", constant, (scored([h] * 4, [1, 1, 0, 0]), scored([0.01] * 4, [1] * 4)))
    assert note is not None
    assert "50.0% for the most frequent span" in note
    assert "network B" not in note


class Words(nn.Module):
    def __init__(self, knows: float) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.eye(CLASSES) * knows)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.table[tokens]


def test_networks_that_read_tokens_are_not_told_of_normalisation() -> None:
    y = labels(200)
    (note,) = noted(Words(0.0), Words(8.0), (y, y))
    assert "network A is near chance" in note
    assert "Do the tokens come from the tokenizer of these networks, and do labels and outputs belong" in note
    assert "normalised" not in note
