"""The page on classes: its examples run as they stand and print what it says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

PAGE = Path(__file__).parents[2] / "docs" / "classes.md"


@pytest.mark.skipif(not PAGE.is_file(), reason="needs the docs folder")
def test_the_examples_print_what_the_page_says(capsys: pytest.CaptureFixture[str]) -> None:
    page = PAGE.read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(blocks) == 3
    commented = re.findall(r"print\(.*\)  # (.*)", blocks[0])
    printed = re.search(r"```text\n(.*?)```", page, re.DOTALL)
    assert printed
    names: dict[str, object] = {}
    with torch.random.fork_rng(devices=[]):
        for block in blocks:
            exec(compile(block, str(PAGE), "exec"), names)
    assert capsys.readouterr().out.splitlines() == [*commented, *printed[1].splitlines()]
    assert len(printed[1].splitlines()) == 7
