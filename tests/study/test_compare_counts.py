"""Comparing a pair by all methods looks at the architecture and at the data once, not once for each method."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from isthmus.matching import METHODS
from isthmus.study import compare, load_dataset, network_for, to_batches


class Counted:
    """Batches that count how often they are read."""

    def __init__(self, batches: list[Any]) -> None:
        self.batches, self.passes = batches, 0

    def __iter__(self) -> Iterator[Any]:
        self.passes += 1
        return iter(self.batches)


def test_a_comparison_makes_few_exports_and_few_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    exports: list[object] = []
    original = torch.export.export

    def counting(*args: Any, **kwargs: Any) -> Any:
        exports.append(args[0])
        return original(*args, **kwargs)

    monkeypatch.setattr(torch.export, "export", counting)
    digits = load_dataset("digits", split="train")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        a, b = (network_for("mlp", digits, width=12, depth=2).eval() for _ in range(2))
    batches = [tuple(batch) for batch in to_batches(digits, 150, limit=400)]
    assert len({len(batch[0]) for batch in batches}) == 2, "the last batch is a smaller one"
    statistics, train, test = Counted(batches), Counted(batches), Counted(batches[:1])
    found = compare(a, b, statistics, {"train": train, "test": test}, name="pair", settings={}, points=3)
    assert list(found.record["methods"]) == ["none", *METHODS.usual]
    assert 1 <= len(exports) <= 3
    assert [data.passes for data in (statistics, train, test)] == [1, 1, 1]
