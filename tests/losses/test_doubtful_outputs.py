"""Outputs that may be meant otherwise than they are read: the first of several, probabilities, an axis of classes."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from isthmus import line
from isthmus.errors import ModelError


class Net(nn.Module):
    def __init__(self, forward: Callable[[Any, Tensor], Any], seed: int) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 3)
        self.run = forward

    def forward(self, x: Tensor) -> Any:
        return self.run(self.b(self.a(x).relu()), self.a(x))


X = torch.randn(12, 4, generator=torch.Generator().manual_seed(0))
Y = torch.randint(3, (12,), generator=torch.Generator().manual_seed(1))
POSITIONS = Y[:, None].expand(-1, 3)


def notes(forward: Callable[[Any, Tensor], Any], targets: Tensor = Y, **options: Any) -> list[str]:
    a, b = (Net(forward, seed).eval() for seed in (0, 1))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = line(a, b, [(X, targets)], points=3, bootstrap=0, **options)
    return [note for note in found.notes if not note.startswith("On ")]


@pytest.mark.parametrize(
    ("forward", "targets", "options", "words"),
    [
        (
            lambda out, h: (h, out),
            Y,
            {},
            r"returns 2 outputs \('0' \(12, 8\), '1' \(12, 3\)\), of which the first, '0', is scored",
        ),
        (lambda out, h: [out, {"more": h}], Y, {}, "of which the first, '0', is scored"),
        (
            lambda out, h: {"x": {"a": h}, "y": out},
            Y,
            {},
            "returns 2 outputs .* of which the first, 'x.a', is scored",
        ),
        (
            lambda out, h: {"features": h, "prediction": out},
            Y,
            {},
            "of which the first, 'features', is scored",
        ),
        (
            lambda out, h: {"loss": h, "a": out, "b": h},
            Y,
            {},
            "returns 2 outputs .* the first, 'a', is scored",
        ),
        (lambda out, h: out.softmax(-1), Y, {}, "add up to 1 over the classes"),
        (
            lambda out, h: torch.stack([out] * 3, 2),
            POSITIONS,
            {},
            r"can have their classes on axis 1 or on the last; the last is taken",
        ),
    ],
)
def test_doubtful_outputs_are_told(
    forward: Callable[[Any, Tensor], Any], targets: Tensor, options: dict[str, Any], words: str
) -> None:
    (note,) = notes(forward, targets, **options)
    assert re.search(words, note)


@pytest.mark.parametrize(
    ("forward", "targets", "options"),
    [
        (lambda out, h: out, Y, {}),
        (lambda out, h: {"features": h, "logits": out}, Y, {}),
        (lambda out, h: (out, h.argmax(-1)), Y, {}),
        (lambda out, h: (out,), Y, {}),
        (lambda out, h: (out, None), Y, {}),
        (lambda out, h: {"loss": h.mean(), "out": out}, Y, {}),
        (
            lambda out, h: (h, out),
            Y,
            {"loss": lambda o, y: nn.functional.cross_entropy(o[1], y, reduction="none")},
        ),
        (lambda out, h: out.log_softmax(-1), Y, {"loss": nn.NLLLoss()}),
        (lambda out, h: out.log_softmax(-1), Y, {}),
        (lambda out, h: torch.stack([out] * 3, 2), POSITIONS, {"loss": nn.CrossEntropyLoss()}),
        (lambda out, h: torch.stack([out] * 2, 2), POSITIONS[:, :2], {}),
    ],
)
def test_plain_outputs_are_not(
    forward: Callable[[Any, Tensor], Any], targets: Tensor, options: dict[str, Any]
) -> None:
    assert notes(forward, targets, **options) == []


def test_a_single_number_before_the_outputs_is_refused() -> None:
    with pytest.raises(ModelError, match="is a single number, so it cannot be scored example by example"):
        notes(lambda out, h: (out.square().mean(), out))
