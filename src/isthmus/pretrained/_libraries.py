"""Which library wrote a model folder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from isthmus.pretrained._diffusers import Diffusers
from isthmus.pretrained._library import Library
from isthmus.pretrained._transformers import Transformers

__all__ = ["TRANSFORMERS", "library_of"]

TRANSFORMERS, _DIFFUSERS = Transformers(), Diffusers()


def library_of(config: Mapping[str, Any]) -> Library:
    """Return the library whose configuration this is: diffusers names one class, transformers architectures."""
    return _DIFFUSERS if config.get("_class_name") and not config.get("architectures") else TRANSFORMERS
