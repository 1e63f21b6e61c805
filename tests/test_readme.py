"""The README's Python example and the example scripts run as they stand."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# Those left out run in tests that read what they write.
EXAMPLES = [
    e
    for e in sorted((ROOT / "examples").glob("*.py"))
    if e.stem not in ("paper_biases", "own_method", "own_operator")
]


def run_script(source: str, folder: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", source],
        capture_output=True,
        text=True,
        check=False,
        cwd=folder,
        env={**os.environ, "ISTHMUS_SMOKE": "1"},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_readme_example_runs_and_shows_a_smaller_barrier(tmp_path: Path) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert blocks
    assert len([line for line in blocks[0].splitlines() if line.strip()]) <= 10
    numbers = [float(x) for x in re.findall(r"barrier ([\d.]+)", run_script(blocks[0], tmp_path))]
    assert len(numbers) == 2
    assert numbers[1] < 0.5 * numbers[0]


DEAR = {"transformers_pair", "why_wide_networks_connect"}


@pytest.mark.parametrize(
    "script", [pytest.param(e, id=e.stem, marks=[pytest.mark.slow] * (e.stem in DEAR)) for e in EXAMPLES]
)
def test_examples_run(script: Path, tmp_path: Path) -> None:
    assert run_script(script.read_text(encoding="utf-8"), tmp_path).strip()


def test_the_readme_names_commands_that_exist() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in set(re.findall(r"make (\w+)", text)):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
