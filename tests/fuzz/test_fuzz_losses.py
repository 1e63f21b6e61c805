"""Random networks, layouts, losses, ignored labels and cuts into batches: the line against torch on everything."""

from __future__ import annotations

import random
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from isthmus.batches import Batch
from isthmus.connectivity import interpolate, line
from isthmus.errors import IsthmusWarning
from isthmus.evaluation import bind
from isthmus.streams import limited


class Net(nn.Module):
    """Classes of examples, of the positions of a text, or of pixels with the classes on axis 1."""

    def __init__(self, classes: int, layout: str) -> None:
        super().__init__()
        self.first, self.last, self.layout = nn.Linear(4, 6), nn.Linear(6, classes), layout

    def forward(self, x: Tensor) -> Tensor:
        outputs = self.last(torch.tanh(self.first(x)))
        return outputs.movedim(-1, 1) if self.layout == "pixels" else outputs


def data_of(choose: random.Random, classes: int, layout: str, ignored: int) -> list[tuple[Tensor, Tensor]]:
    found = []
    for _ in range(choose.randint(1, 4)):
        shape: tuple[int, ...] = (choose.randint(1, 7),)
        if layout != "examples":
            shape += (choose.randint(1, 6),)
        if layout == "pixels":
            shape += (choose.randint(1, 3),)
        labels = torch.randint(classes, shape)
        if choose.random() < 0.7:
            labels[torch.rand(shape) < 0.4] = ignored
        found.append((torch.randn(*shape, 4, dtype=torch.float64), labels))
    return found


def given(choose: random.Random, data: list[tuple[Tensor, Tensor]]) -> Any:
    """The same examples in one of the forms that users have them in."""
    forms = [data, iter(data), [[x, y, torch.arange(len(x))] for x, y in data]]
    forms += [limited(data, batch_size=choose.randint(1, 5)), [(x.numpy(), y.numpy()) for x, y in data]]
    return choose.choice(forms)


def options(
    choose: random.Random, classes: int, layout: str, ignored: int
) -> tuple[Any, nn.CrossEntropyLoss]:
    """A loss as users write it, and the same as a module."""
    weight = torch.rand(classes, dtype=torch.float64) + 0.1 if choose.random() < 0.5 else None
    smoothing = choose.choice([0.0, 0.0, 0.1, 0.5])
    module = nn.CrossEntropyLoss(weight, ignore_index=ignored, label_smoothing=smoothing)
    listed = "" if weight is None else f", weight={weight.tolist()}"
    text = f"cross_entropy(ignore_index={ignored}, label_smoothing={smoothing}{listed})"
    return (text if layout == "text" else module), module


def wrong(seed: int) -> Iterator[str]:
    """Yield what differs between a line and torch."""
    choose = random.Random(seed)
    classes, layout = choose.randint(2, 5), choose.choice(["examples", "text", "pixels"])
    ignored = choose.choice([-100, 255, 0])
    a, b = (Net(classes, layout).double().eval() for _ in "ab")
    data = data_of(choose, classes, layout, ignored)
    labels = torch.cat([y.flatten() for _, y in data])
    counted = labels != ignored
    if not bool(counted.any()):
        return
    loss, module = options(choose, classes, layout, ignored)
    found = line(a, b, given(choose, data), points=choose.choice([2, 3, 4]), loss=loss, bootstrap=0)
    assert found.accuracy is not None
    for t, value, accuracy in zip(
        found.ts.tolist(), found.loss.tolist(), found.accuracy.tolist(), strict=True
    ):
        run = bind(a, interpolate(a, b, t))
        outputs = [run(Batch((x,))) for x, _ in data]
        if layout == "pixels":
            outputs = [o.movedim(1, -1) for o in outputs]
        logits = torch.cat([o.reshape(-1, classes) for o in outputs])
        wanted = float(module(logits, labels)), float((logits.argmax(1) == labels)[counted].double().mean())
        if (value, accuracy) != pytest.approx(wanted, rel=1e-9, abs=1e-12):
            yield f"seed {seed}, t = {t:g}: {(value, accuracy)} for {wanted}"


def check(seeds: range) -> None:
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore", IsthmusWarning)  # random networks are near chance
        for seed in seeds:
            torch.manual_seed(seed)
            assert list(wrong(seed)) == []


def test_losses_agree_with_torch() -> None:
    check(range(60))


@pytest.mark.slow
def test_losses_agree_with_torch_at_length() -> None:
    check(range(60, 3000))
