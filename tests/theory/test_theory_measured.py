"""What the theory pages say was measured is what is stored: tables, figures, examples."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from isthmus.report import THEORY_PICTURES, draw_theory

ROOT = Path(__file__).parents[2]
PAGES = ROOT / "docs" / "theory"
IMAGES = ROOT / "docs" / "images" / "theory"

TABLES = [
    ("03-certificates", ["benchmarks.certificate", "--table", "benchmarks/results/certificate.json"]),
    ("10-trained-networks", ["benchmarks.theory_tables"]),
]


@pytest.mark.parametrize(("page", "command"), TABLES, ids=[page for page, _ in TABLES])
def test_the_tables_of_a_page_are_those_of_its_record(page: str, command: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True, check=True
    )
    text = (PAGES / f"{page}.md").read_text(encoding="utf-8")
    tables = [table for table in done.stdout.split("\n\n") if table.strip()]
    assert len(tables) >= 2
    for table in tables:
        assert table.strip() in text


def test_no_page_waits_for_a_measurement() -> None:
    assert not [path.name for path in PAGES.glob("*.md") if "@@" in path.read_text(encoding="utf-8")]


def test_every_figure_of_a_page_exists_and_every_figure_is_shown() -> None:
    shown: set[str] = set()
    for path in PAGES.glob("*.md"):
        for alt, target in re.findall(r"!\[([^\]]*)\]\(([^)]+)\)", path.read_text(encoding="utf-8")):
            assert (path.parent / target).is_file(), f"{path.name}: {target}"
            assert len(alt) > 20
            shown.add(Path(target).name)
    assert shown >= {path.name for path in IMAGES.glob("*.png")}
    assert sum(path.stat().st_size for path in IMAGES.iterdir()) < 1.3e6


def test_every_stored_record_can_be_drawn_again() -> None:
    kinds = {
        "1-lines": "lines",
        "2-rates": "rates",
        "3-two-regimes": "two_regimes",
        "4-widths": "width",
        "5-certificate": "certificate",
        "6-mean-field": "meanfield",
        "7-dropout": "dropout",
        "8-dimension": "approximate_dimension",
        "10-independence": "independence",
        "10-bounds": "bounds",
    }
    assert set(kinds) == {path.stem for path in IMAGES.glob("*.json")}
    assert set(kinds.values()) <= set(THEORY_PICTURES)
    record = json.loads((IMAGES / "7-dropout.json").read_text(encoding="utf-8"))
    assert draw_theory("dropout", record).png.startswith(b"\x89PNG")


def test_stored_bounds_hold() -> None:
    """The claims behind the page on trained networks, read off the stored numbers."""
    rows = json.loads((IMAGES / "10-bounds.json").read_text(encoding="utf-8"))["networks"]
    for r in rows:
        assert r["measured"] <= r["chain_64"] <= r["chain_16"] <= r["chain_1"] <= r["weights_only"]
        assert r["barrier"] <= r["barrier_64"] <= r["barrier_16"] <= r["barrier_1"] <= r["lipschitz_weights"]
        assert r["barrier_64"] <= r["lipschitz_64"]
        assert r["chain_64"] <= 1.01 * r["measured"]
        assert r["chain_16"] <= 1.09 * r["measured"]
    for record in json.loads((IMAGES / "2-rates.json").read_text(encoding="utf-8"))["records"]:
        for low, mean, error, high in zip(
            *(record[k] for k in ("lower", "means", "errors", "upper")), strict=True
        ):
            assert low <= mean + 3 * error
            assert mean - 3 * error <= high


def test_the_example_of_the_page_on_trained_networks_runs() -> None:
    text = (PAGES / "10-trained-networks.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.M | re.S)
    assert blocks
    for block in blocks:
        assert "assert" in block
        exec(compile(block, "10-trained-networks", "exec"), {})
