"""One word for one thing: a type's name stands for the same thing wherever it occurs (decision 23)."""

from __future__ import annotations

import ast
from collections.abc import Iterable
from pathlib import Path

import isthmus

ROOT = Path(isthmus.__file__).parent


def types_of(tree: ast.Module) -> Iterable[tuple[str, bool]]:
    """List the classes and aliases of a module, without underscores, and which of them are type variables."""
    for node in tree.body:
        if isinstance(node, ast.ClassDef):
            yield node.name.lstrip("_"), False
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            name = node.targets[0].id.lstrip("_")
            if name[:1].isupper() and not name.isupper():
                made = node.value.func if isinstance(node.value, ast.Call) else None
                yield name, isinstance(made, ast.Name) and made.id == "TypeVar"


def doubles(files: Iterable[Path], root: Path) -> dict[str, list[str]]:
    """Return the names that stand in several modules, with these; a type variable may stand in all that use it."""
    found: dict[str, dict[str, bool]] = {}
    for path in files:
        for name, variable in types_of(ast.parse(path.read_text(encoding="utf-8"))):
            found.setdefault(name, {})[str(path.relative_to(root))] = variable
    return {
        name: sorted(places) for name, places in found.items() if len(places) > 1 and not all(places.values())
    }


def test_no_type_name_stands_for_two_things() -> None:
    assert doubles(sorted(ROOT.rglob("*.py")), ROOT) == {}


def test_the_check_sees_a_name_that_stands_twice(tmp_path: Path) -> None:
    (tmp_path / "one.py").write_text("class Line: ...\n_T = TypeVar('_T')\n", encoding="utf-8")
    (tmp_path / "two.py").write_text(
        "_Line = tuple[int, int]\n_T = TypeVar('_T')\nLINES = 3\n", encoding="utf-8"
    )
    assert doubles([tmp_path / "one.py", tmp_path / "two.py"], tmp_path) == {"Line": ["one.py", "two.py"]}
