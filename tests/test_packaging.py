"""Extras: what a message or the documentation tells people to install is there, and `all` is all that commands need."""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

import pytest

from isthmus.cli import main

ROOT = Path(__file__).parents[1]
EXTRAS: dict[str, list[str]] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))[
    "project"
]["optional-dependencies"]
# Services and clusters that a study may report to or run on; large, and useless without an account or machines.
ASKED_FOR_BY_NAME = {"ray", "tensorboard", "wandb"}
FOR_DEVELOPERS = {"test", "dev", "docs"}


def contained(name: str) -> set[str]:
    """Return an extra and all that it contains."""
    inner = {
        n for text in EXTRAS[name] for m in re.findall(r"isthmus\[([\w,]+)\]", text) for n in m.split(",")
    }
    return {name}.union(*(contained(n) for n in inner))


def test_all_contains_what_commands_need() -> None:
    assert contained("all") == set(EXTRAS) - ASKED_FOR_BY_NAME - FOR_DEVELOPERS
    assert contained("test") == set(EXTRAS) - {"dev", "docs"}


def test_every_extra_that_is_named_exists() -> None:
    files = [*(ROOT / "src").rglob("*.py"), *(ROOT / "docs").glob("*.md"), ROOT / "README.md"]
    named = {
        n
        for f in files
        for m in re.findall(r"isthmus\[([\w,]+)\]", f.read_text("utf-8"))
        for n in m.split(",")
    }
    assert named >= {"cli", "io", "hf"}
    assert named <= set(EXTRAS)


@pytest.mark.parametrize("missing", ["typer", "rich", "rich.progress"])
def test_the_command_says_what_it_needs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], missing: str
) -> None:
    """The package without extras installs the command all the same."""
    for name in [n for n in sys.modules if n.startswith("isthmus.cli._")]:
        monkeypatch.delitem(sys.modules, name)
    for name in {missing, *(n for n in sys.modules if n.startswith(f"{missing}."))}:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(SystemExit) as left:
        main()
    assert left.value.code == 2
    first = missing.partition(".")[0]
    told = capsys.readouterr().err
    assert told.startswith(
        f"The command line needs '{first}', which is not installed: pip install \"isthmus[cli]\""
    )
    assert '"isthmus[all]"' in told


def test_a_fault_of_our_own_is_not_taken_for_a_missing_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "isthmus.cli._app", None)
    with pytest.raises(ModuleNotFoundError, match=r"isthmus\.cli\._app"):
        main()
