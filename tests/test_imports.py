"""Imports flow one way, the core needs few packages, and importing has no side effects."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import isthmus

ROOT = Path(isthmus.__file__).parent

# Each package may import those listed before it in the text below, and itself.
LOW = {
    "errors",
    "files",
    "couplings",
    "batches",
    "streams",
    "states",
    "losses",
    "replica",
    "evaluation",
    "checkpoints",
}
CORE = {
    "symmetry",
    "transport",
    "layers",
    "folding",
    "moments",
    "matching",
    "paths",
    "connectivity",
    "merging",
    "explanation",
    "refinement",
}
ALLOWED = {
    "symmetry": LOW,
    "transport": LOW,
    "layers": LOW | {"symmetry"},
    "folding": LOW | {"symmetry", "layers"},
    "moments": LOW | {"symmetry", "transport", "layers"},
    "matching": LOW | {"symmetry", "transport", "layers", "moments"},
    "paths": LOW | {"symmetry", "transport", "layers", "moments"},
    "connectivity": LOW | {"symmetry", "transport", "layers", "moments", "matching", "paths"},
    "merging": LOW | {"symmetry", "transport", "layers", "moments", "matching", "paths"},
    "explanation": LOW | {"symmetry", "transport", "layers", "moments", "matching", "paths"},
    "refinement": LOW | {"symmetry", "matching"},
    "pretrained": LOW | CORE,
    "certificates": LOW | {"symmetry", "transport", "layers"},
    "theory": LOW | {"symmetry", "transport", "layers", "certificates"},
    "networks": LOW | {"symmetry"},
    "testing": LOW | {"symmetry", "transport", "layers", "moments", "matching", "networks"},
    "training": LOW | {"networks"},
    "study": LOW | CORE | {"theory", "testing", "training"},
    "report": LOW | {"matching"},
    "cli": LOW | CORE | {"theory", "pretrained", "testing", "training", "study", "report"},
    **dict.fromkeys(LOW, LOW),
}


def imported_packages(path: Path) -> set[str]:
    """Return the first parts of all ``isthmus.…`` names a file imports."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module]
            if node.module == "isthmus":
                names = [f"isthmus.{alias.name}" for alias in node.names]
        found |= {n.split(".")[1] for n in names if n.startswith("isthmus.")}
    return found


def violations(files: list[Path], root: Path) -> list[str]:
    bad: list[str] = []
    for path in files:
        relative = path.relative_to(root)
        own = relative.parts[0].removesuffix(".py")
        if own in ("__init__", "__main__"):
            continue
        bad += [
            f"{relative} imports {other}"
            for other in sorted(imported_packages(path) - {own} - {"__version__"})
            if other not in ALLOWED[own]
        ]
    return bad


def test_imports_flow_one_way() -> None:
    assert violations(sorted(ROOT.rglob("*.py")), ROOT) == []


def test_the_check_sees_a_wrong_import(tmp_path: Path) -> None:
    (tmp_path / "transport").mkdir()
    wrong = tmp_path / "transport" / "_wrong.py"
    wrong.write_text("from isthmus.matching import align\nimport isthmus.study._demo\n", encoding="utf-8")
    assert violations([wrong], tmp_path) == [
        "transport/_wrong.py imports matching",
        "transport/_wrong.py imports study",
    ]


def private_imports(files: list[Path], root: Path) -> list[str]:
    """Return the imports of private names or modules of another folder."""
    bad: list[str] = []
    for path in files:
        own = path.relative_to(root).parts[0].removesuffix(".py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.ImportFrom) or not (node.module or "").startswith("isthmus."):
                continue
            room, *parts = (node.module or "").split(".")[1:]
            names = [alias.name for alias in node.names]
            if room != own and any(
                part.startswith("_") and part != "__version__" for part in (*parts, *names)
            ):
                bad.append(f"{path.relative_to(root)} imports {', '.join(names)} from {node.module}")
    return bad


def test_no_folder_imports_what_is_private_in_another() -> None:
    assert private_imports(sorted(ROOT.rglob("*.py")), ROOT) == []


def test_the_check_sees_a_private_import(tmp_path: Path) -> None:
    (tmp_path / "study").mkdir()
    wrong = tmp_path / "study" / "_wrong.py"
    wrong.write_text(
        "from isthmus.matching._align import align\nfrom isthmus.moments import _x\n", encoding="utf-8"
    )
    assert private_imports([wrong], tmp_path) == [
        "study/_wrong.py imports align from isthmus.matching._align",
        "study/_wrong.py imports _x from isthmus.moments",
    ]


def test_every_package_has_a_rule() -> None:
    names = {p.name for p in ROOT.iterdir() if p.is_dir() and (p / "__init__.py").exists()}
    assert names <= set(ALLOWED)


@pytest.mark.parametrize(
    "package", ["isthmus", "isthmus.theory", "isthmus.report", "isthmus.study", "isthmus.cli"]
)
def test_importing_brings_no_optional_package(package: str) -> None:
    code = (
        f"import sys, {package}; "
        "extras = {'matplotlib', 'jinja2', 'typer', 'rich', 'sklearn', 'pooch', 'pyarrow', 'PIL', 'ot', "
        "'safetensors', 'numba', 'pydantic', 'yaml', 'ray', 'transformers', 'diffusers'}; "
        "sys.exit(' '.join(sorted(extras & set(sys.modules))) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_public_names_exist() -> None:
    """Whether they are documented is asked in ``test_prose.py``: here a dataclass would document itself."""
    assert not [name for name in isthmus.__all__ if not hasattr(isthmus, name)]
    assert len(set(isthmus.__all__)) == len(isthmus.__all__)
