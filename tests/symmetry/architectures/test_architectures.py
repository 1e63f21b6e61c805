"""Discovery on a hundred architectures: never wrong, never crashing, complete where a reader has said what to find."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

pytest.importorskip("transformers", reason="the suite builds networks from transformers configurations")

from suite import EXPECTED, FAST, NAMES, build, expected_sizes, run
from table import MARKER, page_of, row_of, rows_in

from isthmus.symmetry import discover, verify

CASES = [pytest.param(name, marks=[] if name in FAST else [pytest.mark.slow]) for name in NAMES]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", CASES)
def test_architecture(name: str) -> None:
    entry = run(name)
    assert entry.verification.passed, f"{entry.verification}\n{entry.spec}"
    assert entry.spec.groups
    assert rows_in(page_of({name: row_of(entry)})) == {name: row_of(entry)}
    if name in EXPECTED:
        wanted = expected_sizes(EXPECTED[name])
        assert entry.sizes == wanted, (
            f"missing {wanted - entry.sizes}, unexpected {entry.sizes - wanted}\n{entry.spec}"
        )


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", NAMES)
def test_removed_slots_are_noticed(name: str) -> None:
    """Verification feels nearly every slot: not key biases under a softmax, nor experts that no token chose."""
    model, args, kwargs, outputs = build(name)
    spec = discover(model, args, kwargs, outputs=outputs)
    slots = [(g.name, s) for g in spec.groups.values() if len(g.slots) > 1 for s in g.slots]
    chosen = slots[:: len(slots) // 10 + 1]
    unnoticed = [
        f"{group} without {slot}"
        for group, slot in chosen
        if verify(spec.restrict([group]).without_slot(group, slot), model, args, kwargs).passed
    ]
    assert len(unnoticed) <= 0.4 * len(chosen), unnoticed


def test_the_suite_is_large_and_its_expectations_are_used() -> None:
    assert len(NAMES) == len(set(NAMES)) >= 80
    assert len(EXPECTED) >= 25
    assert set(EXPECTED) <= set(NAMES)
    assert set(FAST) <= set(NAMES)
    assert expected_sizes({"a": (4, 2), "b": (4, 1), "c": (3, 1)}) == Counter({4: 3, 3: 1})


def test_the_page_lists_every_network() -> None:
    page = Path(__file__).parents[3] / "docs" / "architectures.md"
    text = page.read_text(encoding="utf-8")
    assert MARKER in text
    rows = rows_in(text)
    assert list(rows) == list(NAMES)
    assert page_of(rows).split("\n\n")[-1] == text.split("\n\n")[-1]
    assert "wrong: 0;" in text
    assert "**wrong**" not in text
