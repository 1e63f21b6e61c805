"""Import the drawing and page libraries only when a report is written."""

from __future__ import annotations

import importlib
from types import ModuleType

from isthmus.errors import MissingExtraError

__all__ = ["load_extra"]


def load_extra(module: str) -> ModuleType:
    """Import a module of the ``report`` extra.

    Raises:
        MissingExtraError: the module is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingExtraError(
            f"writing a report needs {module.partition('.')[0]}, which cannot be imported ({error}). "
            'Install it with: pip install "isthmus[report]"'
        ) from error
