"""The tutorial of ``docs/studies.md`` runs as it is written."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from isthmus.cli._app import run
from isthmus.study import preset_names
from isthmus.study._config import parse_study

PAGE = Path(__file__).parents[2] / "docs" / "studies.md"

pytestmark = pytest.mark.skipif(not PAGE.is_file(), reason="needs the docs folder")


def block(language: str) -> str:
    """Return the first block of the page in a language."""
    found = re.search(rf"```{language}\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert found is not None
    return found[1]


def commands() -> list[list[str]]:
    lines = [shlex.split(line, comments=True) for line in block("sh").splitlines()]
    assert all(words[:2] == ["isthmus", "study"] for words in lines)
    return [words[1:] for words in lines]


def test_the_file_is_valid_and_the_commands_exist(capsys: pytest.CaptureFixture[str]) -> None:
    study = parse_study(block("yaml"))
    assert (study.name, len(study.variants), len(study.all_pairs)) == ("my-study", 3, 3)
    assert [words[1] for words in commands()] == ["run", "status", "figures", "export"]
    for words in commands():
        assert run([*words[:2], "--help"]) == 0
        shown = capsys.readouterr().out
        assert all(word in shown for word in words if word.startswith("--"))


def test_every_preset_and_option_that_the_page_names_exists(capsys: pytest.CaptureFixture[str]) -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert run(["study", "run", "--help"]) == 0
    shown = capsys.readouterr().out
    options = set(re.findall(r"--[a-z][a-z-]+", text)) - {"--logdir"}
    assert {"--executor", "--workers", "--memory", "--log"} <= options
    assert all(option in shown for option in options)
    assert all(f"`{name}`" in text for name in preset_names())


@pytest.mark.slow
def test_the_tutorial_runs_as_written(tmp_path: Path) -> None:
    (tmp_path / "my-study.yaml").write_text(block("yaml"), encoding="utf-8")
    for words in commands():
        done = subprocess.run(
            [sys.executable, "-m", "isthmus", *words], cwd=tmp_path, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "my-study" / "figures" / "error.svg").is_file()
    assert (tmp_path / "my-study" / "records.parquet").is_file()
    (tmp_path / "study.py").write_text(block("python"), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "study.py"], cwd=tmp_path, capture_output=True, text=True, env=os.environ
    )
    assert done.returncode == 0, done.stderr
    # 3 widths, 3 pairs, 4 methods and 2 splits
    assert done.stdout.split() == ["True", "72"]
