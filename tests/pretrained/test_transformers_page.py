"""The page of trained transformers says what its record says."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest

DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture(scope="module")
def maker() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_transformers", DOCS / "make_transformers.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_tables_are_those_of_the_record(maker: ModuleType) -> None:
    page, record = (
        maker.PAGE.read_text(encoding="utf-8"),
        json.loads(maker.RECORD.read_text(encoding="utf-8")),
    )
    assert maker.filled(page, record) == page
    record["families"]["ViT-like"]["pairs"]["0-1"]["lines"]["weights"]["barrier"] += 1
    assert maker.filled(page, record) != page


def test_a_page_without_a_place_for_a_table(maker: ModuleType) -> None:
    with pytest.raises(ValueError, match=r"has no place for 'setting'. Put <!-- begin setting -->"):
        maker.filled("# Page", {})
