"""Loss functions of the user's: what they get and what they may return."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from isthmus.errors import ShapeError
from isthmus.evaluation import evaluate
from isthmus.losses import score

X = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
Y = torch.tensor([0, 1, 2, 0, 1, 2])


class Heads(nn.Module):
    """A network that returns more than a tensor."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.body, self.head, self.kind = nn.Linear(4, 5), nn.Linear(5, 3), kind

    def forward(self, x: Tensor) -> Any:
        hidden = self.body(x).relu()
        logits = self.head(hidden)
        if self.kind == "tensor":
            return logits
        return {"logits": logits, "hidden": hidden} if self.kind == "dict" else (logits, hidden)


def network(kind: str) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Heads(kind).eval()


def values(logits: Tensor) -> Tensor:
    return F.cross_entropy(logits, Y, reduction="none").detach().double()


@pytest.mark.parametrize(("kind", "pick"), [("dict", "logits"), ("tuple", 0)])
def test_a_function_gets_all_that_the_network_returns(kind: str, pick: Any) -> None:
    seen: list[Any] = []

    def loss(outputs: Any, targets: Any) -> Tensor:
        seen.append(outputs)
        hidden = outputs["hidden"] if kind == "dict" else outputs[1]
        return F.cross_entropy(outputs[pick], targets, reduction="none") + hidden.square().sum(-1)

    model = network(kind)
    found = evaluate(model, [(X, Y)], loss=loss)
    assert type(seen[0]) is (dict if kind == "dict" else tuple)
    with torch.no_grad():
        hidden = model.body(X).relu()  # type: ignore[operator]
    wanted = values(network("tensor")(X)) + hidden.square().sum(-1)
    assert found.loss == pytest.approx(float(wanted.mean()), rel=1e-6)


@pytest.mark.parametrize("targets", [{"y": Y}, (Y, X), [Y, X]], ids=lambda t: type(t).__name__)
def test_targets_of_any_form_reach_a_function(targets: Any) -> None:
    seen: list[Any] = []

    def loss(outputs: Tensor, given: Any) -> Tensor:
        seen.append(given)
        return F.cross_entropy(outputs, given["y"] if isinstance(given, dict) else given[0], reduction="none")

    found = evaluate(network("tensor"), [(X, targets)], loss=loss)
    assert type(seen[-1]) is type(targets)
    assert found.loss == pytest.approx(float(values(network("tensor")(X)).mean()), rel=1e-6)
    assert found.accuracy is None


def test_a_function_may_need_no_targets() -> None:
    found = evaluate(network("tensor"), [X, X[:2]], loss=lambda outputs, targets: outputs.square().sum(-1))
    with torch.no_grad():
        squares = network("tensor")(X).square().sum(-1).double()
    assert found.loss == pytest.approx(float(torch.cat([squares, squares[:2]]).mean()), rel=1e-6)
    assert (found.examples, found.accuracy, found.unit) == (8, None, "<lambda>")


def test_values_of_parts_are_averaged() -> None:
    outputs = torch.randn(4, 3, 2, generator=torch.Generator().manual_seed(1))
    found = score(outputs, None, lambda f, y: f.square())
    torch.testing.assert_close(found.losses, outputs.double().square().mean((1, 2)))
    assert found.weights.tolist() == [1.0] * 4


@pytest.mark.parametrize("each", [False, True])
def test_sums_and_counts(each: bool) -> None:
    """A mean over tokens is that of all, however they are cut into batches."""
    generator = torch.Generator().manual_seed(2)
    x, y = torch.randn(10, 6, 3, generator=generator), torch.randint(3, (10, 6), generator=generator)
    y[torch.rand(10, 6, generator=generator) < 0.5] = -100

    def loss(outputs: Tensor, targets: Tensor) -> tuple[Any, Any]:
        lost = F.cross_entropy(outputs.movedim(-1, 1), targets, reduction="none")
        count = targets != -100
        return (lost.sum(1), count.sum(1)) if each else (lost.sum(), int(count.sum()))

    data = [(x[:7], y[:7]), (x[7:8], y[7:8]), (x[8:], y[8:])]
    found = evaluate(nn.Identity(), data, loss=loss)
    assert found.loss == pytest.approx(float(F.cross_entropy(x.movedim(-1, 1), y)), rel=1e-6)
    assert found.examples == 10


class Focal(nn.Module):
    reduction = "mean"

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs, targets)


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (
            F.cross_entropy.__call__,
            r"returned \(\) for 6 examples; .*\(6,\) or \(6, \.\.\.\), or a pair \(sum, count\)",
        ),
        (Focal(), r"It has reduction='mean': build it with reduction=\"none\""),
        (lambda f, y: f.flatten(), r"returned \(18,\) for 6 examples"),
        (lambda f, y: None, "returned NoneType for 6 examples"),
        (lambda f, y: (f.sum(), {}), r"a pair of \(\) and dict for 6 examples; expected \(sum, count\)"),
        (lambda f, y: (f.sum(-1), f.sum()), r"a pair of \(6,\) and \(\)"),
        (lambda f, y: (1.0, 0), "second part is no count"),
        (lambda f, y: (1.0, -2.0), "second part is no count"),
        (lambda f, y: (1.0, 2.0, 3.0), "returned tuple for 6 examples"),
    ],
)
def test_values_that_are_refused(loss: Any, message: str) -> None:
    with pytest.raises(ShapeError, match=message):
        score(X[:, :3], Y, loss)


def test_a_single_number_for_outputs_is_refused() -> None:
    with pytest.raises(ShapeError, match=r"returned \(\) for 1 examples"):
        score(torch.tensor(1.0), None, lambda f, y: f)


def test_functions_see_at_least_single_precision() -> None:
    seen: list[torch.dtype] = []

    def loss(outputs: Any, targets: Any) -> Tensor:
        seen.append(outputs[0].dtype)
        return outputs[0].sum(-1)

    score((X.bfloat16(), Y), None, loss)
    assert seen == [torch.float32]
