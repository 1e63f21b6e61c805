"""The benchmarks are listed, and the core one, which needs no data, measures what it says."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture
def benchmarks(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT))
    return importlib.import_module("benchmarks.__main__")


@pytest.mark.parametrize(("argument", "code"), [("--list", 0), ("nonsense", 2)])
def test_they_are_listed(
    benchmarks: ModuleType,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    argument: str,
    code: int,
) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmarks", argument])
    with pytest.raises(SystemExit) as stopped:
        benchmarks.main()
    assert stopped.value.code == code
    shown = capsys.readouterr().out
    for name in benchmarks.SHORT:
        assert f"\n  {name}\n" in f"{shown}\n"


def test_the_core_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    core = importlib.import_module("benchmarks.core")
    row = core.measure("mlp", {"width": 12, "depth": 2}, examples=40, repeats=1)
    assert row["groups"] == 2
    assert row["verification_error"] < 1e-10
    assert row["recovered"]["weights"] == 1.0
    assert all(row[key] >= 0 for key in ("discover", "verify", "line"))
    assert core.table({"rows": [row]}).count("\n") == 2
