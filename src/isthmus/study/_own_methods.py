"""Methods of the user's own in a study: found beside its file, known by their code, kept with its results.

``module:METHOD`` is looked for in the folder of the study's file first, then where Python looks, then in the current
folder. A result depends on the code of the method, so its digest is a part of a unit's address: the code of the module,
and of all modules of that folder that it imports.
"""

from __future__ import annotations

import hashlib
import importlib
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from modulefinder import ModuleFinder
from pathlib import Path
from types import ModuleType

from isthmus.errors import DataError, StudyError
from isthmus.files import atomic_path
from isthmus.matching import METHODS, Method, method_named

__all__ = ["OwnMethod", "importing_from", "keep_code", "own_methods", "require_own_method"]


_LIBRARIES = [*sys.stdlib_module_names, "isthmus", "torch", "numpy", "scipy"]
"""Modules that a file of the same name beside the study does not replace."""


@dataclass(frozen=True, eq=False)
class OwnMethod:
    """A method of the user's own.

    Attributes:
        method: itself.
        digest: SHA-256 of the names and contents of its files.
        files: its modules in the folder of the study, by their paths in it; none if it lies elsewhere.
    """

    method: Method
    digest: str
    files: Mapping[str, Path]


def own_methods(names: Iterable[str], folder: str | None) -> dict[str, OwnMethod]:
    """Return those of the methods that are the user's own, by name.

    Args:
        names: of methods, as a study lists them.
        folder: of the study's file; ``None`` if it has none.

    Raises:
        StudyError: one cannot be imported, or is no method.
    """
    return {name: _own_method(name, folder) for name in names if ":" in name}


def require_own_method(name: str, folder: str | None, digest: str) -> Method:
    """Return a method of the user's own, if its code is still that of the study's plan.

    Raises:
        StudyError: it cannot be imported, or its code is another one.
    """
    found = _own_method(name, folder)
    if found.digest != digest:
        raise StudyError(
            f"method {name!r}: expected the code with which the study was started (SHA-256 {digest[:12]}…), found "
            f"another one ({found.digest[:12]}…). Run the study again: what this method measured is then made anew."
        )
    return found.method


@contextmanager
def importing_from(folder: str | None, *, first: bool = False) -> Iterator[None]:
    """Return a context in which modules of a folder can be imported, and no byte code is written beside them.

    Args:
        folder: the folder; ``None`` for a context that changes nothing.
        first: whether it comes before the usual places, not after them.
    """
    if folder is None:
        yield
        return
    before = sys.dont_write_bytecode
    sys.path.insert(0 if first else len(sys.path), folder)
    sys.dont_write_bytecode = True
    try:
        yield
    finally:
        sys.dont_write_bytecode = before
        sys.path.remove(folder)


def keep_code(methods: Mapping[str, OwnMethod], folder: Path) -> None:
    """Write the code of methods beside a study's results, so that the study goes on from there as well.

    Raises:
        OutputError: it cannot be written.
    """
    for own in methods.values():
        for name, source in own.files.items():
            target, content = folder / name, source.read_bytes()
            if not target.is_file() or target.read_bytes() != content:
                target.parent.mkdir(parents=True, exist_ok=True)
                with atomic_path(target) as temporary:
                    temporary.write_bytes(content)


def _own_method(name: str, folder: str | None) -> OwnMethod:
    module = name.partition(":")[0]
    try:
        files = {} if folder is None else _files(module, folder)
        if files:
            assert folder is not None
            digest = _digest(files)
            return OwnMethod(_imported(name, folder, digest), digest, files)
        method = method_named(name)
        file = getattr(sys.modules[module], "__file__", None)
        return OwnMethod(method, _digest({module: Path(file)} if file else {}), {})
    except DataError as error:
        where = (
            "" if folder is None else f" It was looked for in {folder} first, where the study's file lies."
        )
        raise StudyError(f"measure.methods: {error}{where}") from error
    except Exception as error:  # whatever a module raises that is imported
        raise StudyError(
            f"measure.methods: method {name!r}: expected a module that can be imported, found that it raises "
            f"{type(error).__name__}: {error}. Mend the module, or take the method out of the study."
        ) from error


def _files(module: str, folder: str) -> dict[str, Path]:
    """Return the files of a module and of all that it imports from its folder; none if the module is not there."""
    finder = ModuleFinder(path=[folder], excludes=_LIBRARIES)
    try:
        finder.import_hook(module)
    except ImportError:
        return {}
    paths = [Path(file) for m in finder.modules.values() if (file := getattr(m, "__file__", None))]
    return {path.relative_to(folder).as_posix(): path for path in sorted(paths)}


def _digest(files: Mapping[str, Path]) -> str:
    known = hashlib.sha256()
    for name, path in sorted(files.items()):
        content = path.read_bytes()
        known.update(f"{name}\0{len(content)}\0".encode() + content)
    return known.hexdigest()


@cache
def _imported(name: str, folder: str, digest: str) -> Method:
    """Import a method anew for every version of its code; modules of its name from elsewhere stay what they are."""
    names = {Path(file).parts[0].removesuffix(".py") for file in _files(name.partition(":")[0], folder)}
    others = _taken_out(names)
    importlib.invalidate_caches()
    try:
        with importing_from(folder, first=True), METHODS.apart():
            return method_named(name)
    finally:
        _taken_out(names)
        sys.modules.update(others)


def _taken_out(names: Collection[str]) -> dict[str, ModuleType]:
    """Remove the modules of these names, and all below them, from those that are imported, and return them."""
    return {m: sys.modules.pop(m) for m in list(sys.modules) if m.partition(".")[0] in names}
