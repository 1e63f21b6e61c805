"""The examples of the theory pages run."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest

import isthmus.theory

PAGES = Path(__file__).parents[2] / "docs" / "theory"
NAMES = [
    "01-transport",
    "02-rates",
    "03-certificates",
    "04-widths",
    "05-dimension",
    "06-mean-field",
    "07-dropout",
    "08-approximate-dimension",
    "09-corrections",
]


@pytest.mark.parametrize("name", NAMES)
def test_examples_run(name):
    blocks = re.findall(r"^```python\n(.*?)^```", (PAGES / f"{name}.md").read_text("utf-8"), re.M | re.S)
    assert blocks
    for block in blocks:
        assert "assert" in block
        exec(compile(block, name, "exec"), {})


def test_every_function_says_whose_statement_it_is_and_where_it_comes_from():
    for name in isthmus.theory.__all__:
        value = getattr(isthmus.theory, name)
        if inspect.isfunction(value):
            text = inspect.getdoc(value) or ""
            assert any(label in text for label in ("[P", "[L", "[O")), name
            module = inspect.getdoc(inspect.getmodule(value)) or ""
            assert re.search(r"Theory, section|Source", text + module), name


def test_public_names_are_listed_once_and_documented():
    names = isthmus.theory.__all__
    assert len(names) == len(set(names))
    choices = {"Law", "SharedDraws"}  # the words that a parameter takes
    assert all(getattr(isthmus.theory, name).__doc__ for name in names if name not in choices)
