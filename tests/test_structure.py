"""The drawing of the package's structure: what it counts, and which way its arrows point."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).parent.parent / "docs" / "make_structure.py"
pytestmark = pytest.mark.skipif(not SCRIPT.is_file(), reason="needs the docs folder")


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_structure", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["make_structure"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


FILES = {
    "__init__.py": "from whole.top import one\n",
    "low.py": "def f():\n    return 1\n",
    "middle/__init__.py": "from whole.middle._inside import g\n",
    "middle/_inside.py": """from whole.low import f


def g():
    def inner():
        return 2

    return f()
""",
    "top/__init__.py": """from whole.low import f
from whole.middle._inside import (
    g,
    g as h,
)
import whole.low
""",
}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    for name, text in FILES.items():
        path = tmp_path / "src" / "whole" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return tmp_path / "src"


def test_rooms_lines_and_imports_are_counted(script: ModuleType, source: Path) -> None:
    found = script.read(source)
    assert found.rooms == {"low": (1, 2), "middle": (2, 9), "top": (1, 6)}
    assert found.counted(private=True) == {("top", "middle"): 2}
    assert found.counted(private=False) == {("middle", "low"): 1, ("top", "low"): 2}
    assert list(script.report(found)) == [
        "18 lines in 5 files and 3 rooms",
        "lines of a file: median 2, 90th percentile 7.2, most 8 (middle/_inside.py)",
        "longest function: 5 lines (middle/_inside.py:g)",
        "private imports across rooms: 2 names in 1 statements",
        "  top -> middle: 2",
    ]


def test_arrows_point_down_and_those_against_the_order_are_kept(script: ModuleType, source: Path) -> None:
    edges = script.read(source).counted(private=False) + script.Counter({("top", "middle"): 1})
    level = script.layers(["low", "middle", "top"], edges)
    assert level == {"low": 0, "middle": 1, "top": 2}
    assert script.drawn(edges, level) == [("middle", "low"), ("top", "middle")]
    circle = edges + script.Counter({("low", "top"): 1})
    level = script.layers(["low", "middle", "top"], circle)
    assert level["low"] == 0
    assert ("low", "top") in script.drawn(circle, level)


def test_the_drawing_is_the_same_every_time(script: ModuleType, source: Path, tmp_path: Path) -> None:
    one, two = tmp_path / "one.svg", tmp_path / "two.svg"
    for target in (one, two):
        script.draw(script.read(source), target)
    assert one.read_bytes() == two.read_bytes()
    text = one.read_text(encoding="utf-8")
    assert all(word in text for word in ("middle", "2 files, 9 lines", "private imports across rooms (2)"))
