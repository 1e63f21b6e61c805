"""Sphinx configuration; the API pages are generated from every ``__all__``, so new names need no edit."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import types
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, is_typeddict

from sphinx.util import logging

import isthmus

if TYPE_CHECKING:
    from sphinx.application import Sphinx
    from sphinx.config import Config

project = "Isthmus"
author = "The Isthmus developers"
copyright = author
version = release = isthmus.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.mathjax"]
myst_enable_extensions = ["amsmath", "colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3
exclude_patterns = ["_build"]

napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True  # an attribute listed in a docstring and a property of that name are one thing
napoleon_custom_sections = ["Source"]
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
python_maximum_signature_line_length = 88

html_theme = "furo"
html_title = f"Isthmus {release}"
html_copy_source = False
html_show_copyright = False

_API = Path(__file__).parent / "api"
_logger = logging.getLogger(__name__)


def setup(app: Sphinx) -> None:
    """Register the two steps below with Sphinx."""
    app.connect("config-inited", write_api_pages)
    app.connect("autodoc-process-docstring", demand_docstring)


def write_api_pages(app: Sphinx, config: Config) -> None:
    """Write one page per public module, and take away pages of modules that are gone."""
    pages = {f"{module.__name__}.md": page_of(module) for module in public_modules()}
    for path in _API.glob("isthmus*.md"):
        if path.name not in pages:
            path.unlink()
    for name, text in pages.items():
        path = _API / name
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")


def public_modules() -> list[ModuleType]:
    """Return the package and its public modules one level down that list names in ``__all__``."""
    names = [info.name for info in pkgutil.iter_modules(isthmus.__path__) if not info.name.startswith("_")]
    modules = [isthmus, *(importlib.import_module(f"isthmus.{name}") for name in names)]
    return [module for module in modules if getattr(module, "__all__", None)]


def page_of(module: ModuleType) -> str:
    """Return the page of a module; a name that another public module owns is linked, not told twice."""
    lines = [
        f"# {module.__name__}",
        "",
        "```{eval-rst}",
        f".. automodule:: {module.__name__}",
        "   :no-members:",
        "",
    ]
    lines += [f".. py:currentmodule:: {module.__name__}", ""]
    for name in module.__all__:
        value = getattr(module, name)
        owner = owner_of(name, value, module)
        if owner is not module:
            lines += [f"``{module.__name__}.{name}`` is :py:obj:`{owner.__name__}.{name}`.", ""]
        else:
            options = [f"   {option}" for option in options_of(value)]
            lines += [f".. {directive_of(value)}:: {name}", *options, ""]
    return "\n".join([*lines, "```", ""])


def owner_of(name: str, value: Any, module: ModuleType) -> ModuleType:
    """Return the module below ``isthmus`` that tells of an object: where it is written, else the first to export it."""
    owners = [m for m in public_modules()[1:] if name in m.__all__ and getattr(m, name) is value]
    home = f"{getattr(value, '__module__', '')}."
    written = [m for m in owners if home.startswith(f"{m.__name__}.")]
    if module is isthmus:
        return (written or owners or [module])[0]
    return written[0] if written else module


def directive_of(value: Any) -> str:
    """Return the autodoc directive for an object."""
    if inspect.isclass(value):
        return "autoexception" if issubclass(value, BaseException) else "autoclass"
    if isinstance(value, types.GenericAlias):
        return "py:data"  # autodoc would show the documentation of dict or list
    return "autofunction" if inspect.isroutine(value) else "autodata"


def options_of(value: Any) -> list[str]:
    """Return the directive's options: members of a class, all fields of a TypedDict, an alias's meaning."""
    if isinstance(value, types.GenericAlias):
        return [f":value: {value}"]
    if not inspect.isclass(value) or issubclass(value, BaseException):
        return []
    return [":members:", ":undoc-members:"] if is_typeddict(value) else [":members:"]


def demand_docstring(app: Sphinx, what: str, name: str, value: Any, options: Any, lines: list[str]) -> None:
    """Warn, and so fail the build, where a public module, class or function says nothing about itself."""
    if what in ("module", "class", "exception", "function") and not any(line.strip() for line in lines):
        _logger.warning("%s: a public %s without a docstring. Write one.", name, what)
