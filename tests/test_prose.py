"""Citations lead somewhere, to the bibliography or a section of the theory, and public names say what they do."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import isthmus

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
LONGEST = 120
"""The line limit of the linter for prose."""

pytestmark = pytest.mark.skipif(not DOCS.is_dir(), reason="needs the docs folder")

NAME = r"[A-Z][A-Za-zéöü]+"
CITATION = re.compile(
    rf"({NAME})(?:(?:,\s+{NAME})*,?\s+(?:and|&)\s+{NAME}|\s+et\s+al\.?)?,?\s+\(?((?:1[89]|20)\d\d)\b"
)
NO_AUTHORS = {"AISTATS", "Beyond", "November"}
SECTIONS = re.compile(r"Theory,\s+sections?\s+(\d+(?:\.\d+)?(?:(?:,\s+|\s+and\s+|\s+to\s+)\d+(?:\.\d+)?)*)")


def texts() -> Iterator[tuple[Path, str]]:
    """Yield everything that may cite: code, pages, examples, benchmarks."""
    patterns = (
        "src/**/*.py",
        "docs/**/*.md",
        "docs/*.py",
        "tests/**/*.py",
        "benchmarks/*.py",
        "examples/*.py",
    )
    for pattern in (*patterns, "README.md"):
        for path in ROOT.glob(pattern):
            if "_build" not in path.parts and path not in (DOCS / "bibliography.md", Path(__file__)):
                yield path.relative_to(ROOT), path.read_text(encoding="utf-8")


def public_objects() -> Iterator[tuple[str, Any]]:
    """Yield every public name of every public module that can have a docstring, with its public methods."""
    names = [i.name for i in pkgutil.iter_modules(isthmus.__path__) if not i.name.startswith("_")]
    seen: set[int] = set()
    for module in (isthmus, *(importlib.import_module(f"isthmus.{name}") for name in names)):
        for name in getattr(module, "__all__", ()):
            value = getattr(module, name)
            if id(value) in seen or not (inspect.isclass(value) or inspect.isroutine(value)):
                continue
            seen.add(id(value))
            if isinstance(value, types.GenericAlias):
                continue
            yield f"{module.__name__}.{name}", value
            if inspect.isclass(value):
                for key, member in vars(value).items():
                    if not key.startswith("_") and isinstance(
                        member, (types.FunctionType, property, classmethod, staticmethod)
                    ):
                        yield f"{module.__name__}.{name}.{key}", member


def test_every_paper_cited_stands_in_the_bibliography_and_every_entry_is_cited() -> None:
    page = (DOCS / "bibliography.md").read_text(encoding="utf-8")
    entries = re.findall(r"^- \*\*([\w-]+) (\d{4})\.\*\*(.*?)(?=^- |^## |\Z)", page, re.MULTILINE | re.DOTALL)
    numbers = {n for _, _, text in entries for n in re.findall(r"\d{4}\.\d{5}", text)}
    listed = {(name, year) for name, year, _ in entries}
    assert len(listed) == len(entries) > 30
    missing, cited, linked = [], set(), set()
    for path, text in texts():
        linked |= (found := set(re.findall(r"(?i)arxiv[:/ ]+(?:abs/)?(\d{4}\.\d{5})", text)))
        missing += [f"{path}: arXiv {number}" for number in found - numbers]
        for match in CITATION.finditer(text):
            if match[1] not in NO_AUTHORS:
                cited.add((match[1], match[2]))
                if (match[1], match[2]) not in listed:
                    missing.append(f"{path}: {match[0]!r}")
    assert not missing, "\n".join(missing)
    unused = [f"{n} {y}" for n, y, t in entries if (n, y) not in cited and not any(k in t for k in linked)]
    assert not unused


def test_every_section_of_the_theory_that_is_cited_exists() -> None:
    headings = {
        number
        for path in (DOCS / "theory").glob("*.md")
        for number in re.findall(r"^#+ (\d+(?:\.\d+)?)\.? ", path.read_text(encoding="utf-8"), re.MULTILINE)
    }
    cited = [
        (path, number)
        for path, text in texts()
        for match in SECTIONS.finditer(text)
        for number in re.findall(r"\d+(?:\.\d+)?", match[1])
    ]
    assert len(cited) > 60
    assert not [f"{path}: {number}" for path, number in cited if number not in headings]


def test_every_public_name_says_in_one_line_what_it_is_or_does() -> None:
    wrong = []
    for name, value in public_objects():
        text = inspect.getdoc(value) or ""
        first, _, rest = text.partition("\n")
        if not first:
            wrong.append(f"{name}: no docstring")
        elif rest and rest[0] != "\n":
            wrong.append(f"{name}: the first line goes on: {first}")
        elif not first.endswith(".") or len(first) > LONGEST:
            wrong.append(f"{name}: {first}")
        elif inspect.isclass(value) and text == (inspect.getdoc(value.__base__) or ""):
            wrong.append(f"{name}: the docstring of its base")
    assert not wrong, "\n".join(wrong)


ARTICLES = ("A ", "An ", "The ", "This ", "It ", "If ", "No ", "Every ", "Each ", "What ")


def test_functions_begin_with_what_they_do() -> None:
    """A function returns, draws, reads … something: no article, no question, no condition comes first."""
    wrong = [
        f"{name}: {first.splitlines()[0]}"
        for name, value in public_objects()
        if isinstance(value, types.FunctionType) and name.count(".") == 2
        for first in [inspect.getdoc(value) or ""]
        if first.startswith(ARTICLES)
    ]
    assert not wrong, "\n".join(wrong)


def test_make_test_runs_the_examples_of_docstrings() -> None:
    recipe = (ROOT / "Makefile").read_text(encoding="utf-8").partition("\ntest:")[2].partition("\n\n")[0]
    assert "--doctest-modules src" in recipe
    assert not [p for p, text in texts() if p.parts[0] == "src" and "doctest: +SKIP" in text]
