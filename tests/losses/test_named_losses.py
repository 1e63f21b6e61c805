"""Losses by name and torch's own, against torch."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from isthmus.errors import DataError, ShapeError
from isthmus.evaluation import evaluate
from isthmus.losses import Scores, class_axis_last, score

DRAW = torch.Generator().manual_seed(0)
LOGITS = torch.randn(
    6, 5, 7, generator=DRAW, dtype=torch.float64
)  # six examples, seven positions, five classes
LABELS = torch.randint(5, (6, 7), generator=DRAW)
LABELS[0, 3:], LABELS[4] = -100, -100
WEIGHT = torch.tensor([0.2, 1.0, 0.0, 3.0, 0.7], dtype=torch.float64)
ANSWERS = torch.randint(2, (6, 5), generator=DRAW).double()


def close(found: Scores, wanted: Tensor) -> None:
    assert found.loss == pytest.approx(float(wanted), rel=1e-10)


def pieces(outputs: Tensor, targets: Tensor, loss: Any) -> Scores:
    """Score two batches of unequal size and one example after the other: the mean must not see it."""
    cuts = [slice(0, 4), slice(4, 5), slice(5, 6)]
    return Scores.cat([score(outputs[c], targets[c], loss) for c in cuts])


@pytest.mark.parametrize(
    "text", ["cross_entropy", "cross_entropy(ignore_index=-100)", nn.CrossEntropyLoss(), F.cross_entropy]
)
@pytest.mark.parametrize("layout", ["convolution", "text"])
def test_labels_that_are_ignored_do_not_count(text: Any, layout: str) -> None:
    outputs = LOGITS if layout == "convolution" else LOGITS.movedim(1, -1)
    for found in (score(outputs, LABELS, text), pieces(outputs, LABELS, text)):
        close(found, F.cross_entropy(LOGITS, LABELS))
        assert found.weights.tolist() == [3, 7, 7, 7, 0, 7]
        assert found.losses[4] == 0
        counted = LABELS != -100
        right = (LOGITS.argmax(1) == LABELS)[counted].double().mean()
        assert found.accuracy == pytest.approx(float(right), rel=1e-12)


def test_another_label_can_be_ignored() -> None:
    labels = LABELS.where(LABELS != -100, 255)
    for loss in ("cross_entropy(ignore_index=255)", nn.CrossEntropyLoss(ignore_index=255)):
        close(pieces(LOGITS, labels, loss), F.cross_entropy(LOGITS, labels, ignore_index=255))
    zero = LABELS.where(LABELS != -100, 0)
    close(
        pieces(LOGITS, zero, "cross_entropy(ignore_index=0)"), F.cross_entropy(LOGITS, zero, ignore_index=0)
    )
    with pytest.raises(
        DataError, match=r'Labels run from 0 to 255.*named by loss="cross_entropy\(ignore_index=255\)"'
    ):
        score(LOGITS, labels)
    with pytest.raises(
        DataError, match=r'ignore_index=-100\)" \(on the command line --ignore-index -100\); now it is 255'
    ):
        score(LOGITS, LABELS, "cross_entropy(ignore_index=255)")


def test_what_is_ignored_may_be_nan() -> None:
    broken = LOGITS.clone()
    broken[4] = float("nan")
    close(score(broken, LABELS), F.cross_entropy(LOGITS, LABELS))


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("ignored", [False, True])
def test_class_weights_and_smoothing(smoothing: float, weighted: bool, ignored: bool) -> None:
    weight = (WEIGHT if smoothing == 0 else WEIGHT + 0.1) if weighted else None
    labels = LABELS if ignored else LABELS.where(LABELS != -100, 1)
    loss = nn.CrossEntropyLoss(weight=weight, label_smoothing=smoothing)
    wanted = loss(LOGITS, labels)
    close(pieces(LOGITS, labels, loss), wanted)
    part = functools.partial(F.cross_entropy, weight=weight, label_smoothing=smoothing)
    close(pieces(LOGITS, labels, functools.partial(part)), wanted)
    if weighted:
        listed = weight.tolist() if weight is not None else []
        close(pieces(LOGITS, labels, f"cross_entropy(weight={listed}, label_smoothing={smoothing})"), wanted)


def test_options_are_not_kept_by_reference() -> None:
    loss = nn.CrossEntropyLoss(weight=WEIGHT.clone())
    before = {k: v.clone() for k, v in loss.state_dict().items()}
    score(LOGITS.float(), LABELS, loss)
    assert loss.reduction == "mean"
    assert loss.weight.dtype == torch.float64  # type: ignore[union-attr]
    assert torch.equal(before["weight"], loss.weight)  # type: ignore[arg-type]
    assert nn.BCEWithLogitsLoss().reduction == "mean"


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("weighted", [False, True])
def test_probabilities_as_targets(smoothing: float, weighted: bool) -> None:
    loss = nn.CrossEntropyLoss(weight=WEIGHT + 0.1 if weighted else None, label_smoothing=smoothing)
    flat, soft = LOGITS[..., 0], LOGITS[..., 1].softmax(1)
    close(pieces(flat, soft, loss), loss(flat, soft))
    shares = LOGITS.flip(0).softmax(1)
    close(pieces(LOGITS, shares, loss), loss(LOGITS, shares))
    if not weighted:
        named = f"cross_entropy(label_smoothing={smoothing})"
        close(score(LOGITS, shares, named), loss(LOGITS, shares))
        close(score(LOGITS.movedim(1, -1), shares.movedim(1, -1), named), loss(LOGITS, shares))
    assert score(flat, soft).accuracy == pytest.approx(
        float((flat.argmax(1) == soft.argmax(1)).double().mean())
    )
    with pytest.raises(
        DataError, match="expected that they sum to 1 along axis 1 or along the last one, found 0"
    ):
        score(LOGITS, LOGITS.abs())


def test_torch_losses_have_classes_on_axis_1() -> None:
    square = torch.randn(4, 5, 5, generator=DRAW)
    labels = torch.randint(5, (4, 5), generator=DRAW)
    assert score(square, labels, nn.CrossEntropyLoss()).loss == pytest.approx(
        float(F.cross_entropy(square, labels)), rel=1e-6
    )
    assert score(square, labels).loss == pytest.approx(float(F.cross_entropy(square.mT, labels)), rel=1e-6)
    assert class_axis_last(square, labels, prefer_first=True).stride() == square.mT.stride()  # type: ignore[union-attr]


def test_log_probabilities() -> None:
    logs = LOGITS.log_softmax(1)
    for loss in (nn.NLLLoss(weight=WEIGHT), functools.partial(F.nll_loss, weight=WEIGHT)):
        close(pieces(logs, LABELS, loss), F.nll_loss(logs, LABELS, weight=WEIGHT))


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_other_reductions(reduction: str) -> None:
    found = pieces(LOGITS, LABELS, nn.CrossEntropyLoss(reduction=reduction))
    if reduction == "none":  # no mean was asked for: that over all labels that count
        close(found, F.cross_entropy(LOGITS, LABELS))
    else:  # the mean over examples of their sums
        close(found, F.cross_entropy(LOGITS, LABELS, reduction="sum") / len(LABELS))
    squares = pieces(LOGITS, LOGITS + 1.0, nn.MSELoss(reduction="sum"))
    assert squares.loss == pytest.approx(35.0)


FLAT, OTHER = LOGITS[..., 0], LOGITS[..., 1]
SIGNS = 2 * ANSWERS - 1
ELEMENTWISE: list[tuple[nn.Module, Any, Tensor, Tensor]] = [
    (nn.MSELoss(), F.mse_loss, FLAT, OTHER),
    (nn.L1Loss(), F.l1_loss, FLAT, OTHER),
    (nn.SmoothL1Loss(beta=0.3), functools.partial(F.smooth_l1_loss, beta=0.3), FLAT, OTHER),
    (nn.HuberLoss(delta=0.4), functools.partial(F.huber_loss, delta=0.4), FLAT, OTHER),
    (nn.BCEWithLogitsLoss(pos_weight=torch.rand(5)), None, FLAT, ANSWERS),
    (nn.BCEWithLogitsLoss(), F.binary_cross_entropy_with_logits, FLAT, ANSWERS),
    (nn.BCELoss(), F.binary_cross_entropy, FLAT.sigmoid(), ANSWERS),
    (nn.KLDivLoss(), F.kl_div, FLAT.log_softmax(1), OTHER.softmax(1)),
    (nn.KLDivLoss(reduction="batchmean", log_target=True), None, FLAT.log_softmax(1), OTHER.log_softmax(1)),
    (nn.PoissonNLLLoss(), F.poisson_nll_loss, FLAT, ANSWERS),
    (nn.SoftMarginLoss(), F.soft_margin_loss, FLAT, SIGNS),
    (nn.HingeEmbeddingLoss(), F.hinge_embedding_loss, FLAT, SIGNS),
    (nn.MultiLabelSoftMarginLoss(), F.multilabel_soft_margin_loss, FLAT, ANSWERS),
    (nn.MultiMarginLoss(), F.multi_margin_loss, FLAT, torch.arange(6) % 5),
]  # fmt: skip


@pytest.mark.filterwarnings("ignore:reduction. 'mean' divides")  # torch, of KLDivLoss
@pytest.mark.parametrize("case", ELEMENTWISE, ids=lambda c: type(c[0]).__name__)
def test_losses_of_torch_by_example(case: tuple[Any, Any, Tensor, Tensor]) -> None:
    loss, function, outputs, targets = case
    wanted = loss(outputs, targets)
    close(pieces(outputs, targets, loss), wanted)
    if function is not None:
        close(pieces(outputs, targets, function), wanted)


def test_yes_or_no() -> None:
    found = score(FLAT, ANSWERS.bool(), "bce")
    close(found, F.binary_cross_entropy_with_logits(FLAT, ANSWERS))
    assert found.accuracy == pytest.approx(float(((FLAT > 0) == (ANSWERS > 0)).double().mean()))
    single = score(FLAT[:, :1], ANSWERS[:, 0], "bce")
    close(single, F.binary_cross_entropy_with_logits(FLAT[:, 0], ANSWERS[:, 0]))
    close(score(FLAT[:, 0], ANSWERS[:, :1], "mse"), F.mse_loss(FLAT[:, 0], ANSWERS[:, 0]))
    probabilities = score(FLAT.sigmoid(), ANSWERS, nn.BCELoss())
    assert probabilities.accuracy == found.accuracy


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (
            "hinge",
            r"Unknown loss 'hinge': expected \"cross_entropy\", \"mse\", \"bce\", \"model\" or a function",
        ),
        (
            "cross_entropy(ignore=3)",
            r"has no option 'ignore'\. Known options: ignore_index, label_smoothing, weight",
        ),
        ("mse(weight=[1])", r"has no option 'weight'\. Known options: none"),
        ("cross_entropy(255)", "Cannot read the loss 'cross_entropy.255.'"),
        ("cross_entropy(ignore_index=", "Cannot read the loss"),
        ("cross_entropy(ignore_index=__import__('os'))", "Cannot read the loss"),
        ("cross_entropy(weight=['a'])", "an option has a value of the wrong kind"),
        ("cross_entropy(label_smoothing=2)", "expected label_smoothing from 0 to 1, found 2"),
        ("cross_entropy(weight=[-1.0, 1.0])", r"expected one weight of at least 0 for each class"),
        ("cross_entropy(weight=[0, 1], label_smoothing=0.1)", "a class of weight 0 adds to a mean"),
        (nn.TripletMarginLoss(), r"torch\.nn\.TripletMarginLoss needs more than outputs and targets"),
        (nn.CTCLoss(), r"torch\.nn\.CTCLoss needs more"),
        (functools.partial(F.mse_loss, **{"wrong": 1}), r"The loss MSELoss: .*wrong"),
        (
            nn.MSELoss(reduction="median"),
            r"MSELoss: expected a reduction among mean, sum, none, found 'median'",
        ),
        (3, "Unknown loss of type int"),
    ],
    ids=lambda value: None if isinstance(value, functools.partial) else str(value),
)
def test_losses_that_are_refused(loss: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        score(FLAT, LABELS[:, 0], loss)


def test_shapes_that_are_refused() -> None:
    with pytest.raises(ShapeError, match="2 class weights for 5 classes"):
        score(LOGITS, LABELS, "cross_entropy(weight=[1, 2])")
    with pytest.raises(
        ShapeError, match=r"Bce of outputs \(6, 5\) and targets \(6,\): expected equal shapes"
    ):
        score(FLAT, ANSWERS[:, 0], "bce")
    with pytest.raises(DataError, match="The loss 'mse' needs a tensor of targets, found a dict"):
        score(FLAT, {"a": ANSWERS}, "mse")
    with pytest.raises(ShapeError, match=r"gave values of shape \(\) for 6 examples"):
        score(FLAT[:, 0], torch.zeros(6, dtype=torch.int64), nn.MultiLabelMarginLoss())
    with pytest.raises(
        ShapeError, match=r"MultiMarginLoss cannot score outputs \(6, 5\) by targets \(6, 5\) of torch"
    ):
        score(FLAT, ANSWERS, nn.MultiMarginLoss())


@pytest.mark.parametrize(
    "targets",
    [
        torch.rand(4, 3),
        torch.rand(4, 1),
        torch.tensor([[1.0, 0.0, 1.0]] * 4),
        torch.tensor([[2.0, -1.0, 0.0]] * 4),
    ],
)
def test_values_are_not_scored_by_the_default(targets: Tensor) -> None:
    model, x = nn.Linear(2, targets.shape[1]).eval(), torch.randn(4, 2)
    with pytest.raises(
        DataError, match=r"neither labels nor probabilities of classes.*--loss mse or --loss bce"
    ):
        evaluate(model, [(x, targets)])
    assert evaluate(model, [(x, targets)], loss="mse").loss > 0
    shares = torch.softmax(torch.randn(4, 3), 1)
    assert evaluate(nn.Linear(2, 3).eval(), [(x, shares)]).loss > 0


def test_images_are_not_scored_by_the_default() -> None:
    x = torch.rand(4, 3, 5, 5)
    with pytest.raises(DataError, match=r"values of shape \(4, 3, 5, 5\), neither labels nor probabilities"):
        evaluate(nn.Conv2d(3, 3, 1).eval(), [(x, x)])
    with pytest.raises(DataError, match=r"loss=\"mse\" \(on the command line --loss mse\) for values"):
        evaluate(nn.Conv2d(3, 3, 1).eval(), [(x, x)], loss="cross_entropy")
