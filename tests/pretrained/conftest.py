from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest
import transformers
from pretrained_models import save, tiny

from isthmus.pretrained import OpenedModel, open_model
from isthmus.symmetry import SymmetrySpec

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()


class Pair(NamedTuple):
    """Two saved networks of one family, opened; the second lies in several shards."""

    a: OpenedModel
    b: OpenedModel
    spec: SymmetrySpec


@pytest.fixture(scope="session")
def pair_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Pair]:
    """Return the pair of a family; made and traced once."""

    @cache
    def made(kind: str) -> Pair:
        root: Path = tmp_path_factory.mktemp(kind)
        a = open_model(save(tiny(kind, 0), root / "a"))
        b = open_model(save(tiny(kind, 1), root / "b", shard="2KB"))
        return Pair(a, b, a.discover())

    return made
